# SPDX-License-Identifier: Apache-2.0
"""Where the time goes, how fast it is, how much memory it takes, and what padding wastes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_g2rpo.report.charts.base import PALETTE, Chart, Measured, Trace, axes, each_run, noisy, of_names
from megatron_g2rpo.report.metrics import Metrics, Series

_NO_PHASES = ("time/step", "time/validation")


def phases(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The seconds of each phase of a step, stacked: a chart for each run."""
    for number, (measured, suffix, _) in enumerate(each_run(runs)):
        metrics = measured.run.metrics
        names = [name for name in metrics.series if name.startswith("time/") and name not in _NO_PHASES]
        steps = metrics["time/step"].steps
        traces: list[Trace] = []
        for place, name in enumerate(names):
            # A phase that not every step has, as the measurement of gradients, takes no time in the others.
            known = dict(zip(metrics[name].steps, metrics[name].values, strict=True))
            whole = Series(steps=steps, values=[known.get(step, 0.0) for step in steps])
            trace = noisy(name.removeprefix("time/"), whole, PALETTE[place % len(PALETTE)])[-1]
            traces.append({**trace, "mode": "lines", "stackgroup": "phases"})
        yield Chart(
            name="phases" if number == 0 else f"phases-{number + 1}",
            title=f"Seconds of a step, by phase{suffix}",
            about=(
                "Where the time goes: the height is the length of a step, a colour its phase (moving averages). "
                "Validation and checkpoints come on top."
            ),
            traces=traces,
            layout=axes("seconds"),
        )


def speed(runs: Sequence[Measured]) -> Iterator[Chart]:
    """Response tokens a second of a whole step."""
    traces: list[Trace] = []
    for measured, suffix, dash in each_run(runs):
        series, label = _tokens_a_second(measured.run.metrics)
        if series:
            traces += noisy(f"{label}{suffix}", series, PALETTE[0], dash)
    yield Chart(
        name="speed",
        title="Tokens a second",
        about="How many tokens a second the run trains on, all ranks together, sampling included; higher is faster.",
        traces=traces,
        layout=axes("tokens / s"),
    )


def _tokens_a_second(metrics: Metrics) -> tuple[Series, str]:
    if measured := metrics["speed/tokens_per_second"]:
        return measured, "tokens"
    seconds = dict(zip(metrics["time/step"].steps, metrics["time/step"].values, strict=True))
    counted = metrics["train/num_tokens"]
    pairs = [
        (step, count / spent)
        for step, count in zip(counted.steps, counted.values, strict=True)
        if count is not None and (spent := seconds.get(step))
    ]
    return Series(steps=[step for step, _ in pairs], values=[value for _, value in pairs]), "response tokens"


def memory(runs: Sequence[Measured]) -> Iterator[Chart]:
    """Peak memory, as far as it was logged."""
    names = dict.fromkeys(name for each in runs for name in each.run.metrics.series if name.startswith("memory/"))
    yield Chart(
        name="memory",
        title="Memory",
        about="The peak memory of a step's processes: flat is healthy, a slow rise is a leak.",
        traces=of_names(runs, {name: name.removeprefix("memory/").replace("_", " ") for name in names}),
        layout=axes("GB"),
        needs="memory/* metrics",
    )


def padding(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The share of tokens that is padding, and of those that a shared prompt saves."""
    traces: list[Trace] = []
    for measured, suffix, dash in each_run(runs):
        metrics = measured.run.metrics
        real = metrics["train/real_tokens"]
        wasted = Series(steps=real.steps, values=[None if value is None else 1 - value for value in real.values])
        traces += noisy(f"padding{suffix}", wasted, PALETTE[3], dash) if real else []
        saved = _share_saved(metrics)
        traces += noisy(f"not computed, as prompts are shared{suffix}", saved, PALETTE[2], dash) if saved else []
    yield Chart(
        name="padding",
        title="Padding and sharing",
        about="Padding is computed for nothing, so lower is better; what shared prompts save is not computed at all.",
        traces=traces,
        layout=axes("share of tokens"),
    )


def _share_saved(metrics: Metrics) -> Series:
    """Tokens that were not computed because a prompt is shared, as a share of those without sharing."""
    done = dict(zip(metrics["work/tokens"].steps, metrics["work/tokens"].values, strict=True))
    saved = metrics["work/tokens_saved"]
    pairs = [
        (step, value / (value + (done.get(step) or 0.0)))
        for step, value in zip(saved.steps, saved.values, strict=True)
        if value
    ]
    return Series(steps=[step for step, _ in pairs], values=[value for _, value in pairs])
