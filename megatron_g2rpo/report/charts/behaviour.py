# SPDX-License-Identifier: Apache-2.0
"""Lengths against their envelopes and entropies against their bounds: the paper's two figures, of one's own run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_g2rpo.report.charts.base import (
    BOUND,
    PALETTE,
    SAMPLED,
    Chart,
    Measured,
    Trace,
    axes,
    band,
    each_run,
    level,
    noisy,
    slug,
    tasks_of,
    zone,
)
from megatron_g2rpo.report.statistics import length_band


def lengths(runs: Sequence[Measured]) -> Iterator[Chart]:
    """Response tokens of each task, and the plateau and the ends of its length reward."""
    for task in tasks_of(runs):
        shapes = []
        if envelope := runs[0].run.of_task(task, "length"):
            shapes = [
                zone(envelope["peak_start"], envelope["peak_end"], PALETTE[2]),
                *(level(envelope[end]) for end in ("start", "end")),
            ]
        traces: list[Trace] = []
        for measured, suffix, dash in each_run(runs):
            if measured.overview is not None:
                spread = length_band(measured.overview, task)
                traces += band(f"10th to 90th percentile{suffix}", spread, SAMPLED)
            if series := measured.run.metrics[f"train/{task}/response_tokens"]:
                traces += noisy(f"mean length{suffix}", series, SAMPLED, dash)
        about = "The mean length of responses" + (
            ": within the green stripe the length reward is whole, at the dotted lines it is 0"
            if shapes
            else "; the recipe has no length reward for this task"
        )
        recorded = any(each.overview is not None for each in runs)
        yield Chart(
            name=slug("length", task),
            title=f"Response length: {task}",
            about=f"{about}{'; the band holds the middle 80 % of them' if recorded else ''}.",
            traces=traces,
            layout=axes("tokens", shapes=shapes),
        )


def entropies(runs: Sequence[Measured]) -> Iterator[Chart]:
    """Mean token entropy of each task, and the bounds that entropy shaping keeps it within."""
    shaped = runs[0].run.setting("loss_fn.entropy_shaping.enabled", False)
    for task in tasks_of(runs):
        bounds = runs[0].run.of_task(task, "entropy") if shaped else None
        shapes = [level(bounds[side], BOUND) for side in ("low", "high")] if bounds else []
        traces: list[Trace] = []
        for measured, suffix, dash in each_run(runs):
            if series := measured.run.metrics[f"train/{task}/entropy"]:
                traces += noisy(f"entropy{suffix}", series, PALETTE[4], dash)
        yield Chart(
            name=slug("entropy", task),
            title=f"Token entropy: {task}",
            about=(
                "How undecided the policy is about a token: near 0 it has stopped exploring, a steep rise may be noise"
                + (
                    "; beyond the dotted bounds entropy shaping pulls it back."
                    if shapes
                    else "; not shaped in this run."
                )
            ),
            traces=traces,
            layout=axes("nats", shapes=shapes),
        )
