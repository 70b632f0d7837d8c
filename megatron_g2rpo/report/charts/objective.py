# SPDX-License-Identifier: Apache-2.0
"""Advantages against N(0, 1), groups without signal, the gradient of each task, clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_g2rpo.report.charts.base import (
    PALETTE,
    TRAINED,
    Chart,
    Measured,
    Trace,
    axes,
    by_task,
    colour_of,
    each_run,
    of_names,
    rounded,
    slug,
    tasks_of,
)
from megatron_g2rpo.report.statistics import advantage_quantiles

_REACH = 3.0  # standard deviations that a quantile plot shows


def advantages(runs: Sequence[Measured]) -> Iterator[Chart]:
    """A quantile plot of each task's advantages against N(0, 1), and their distance from it over the steps."""
    for task in tasks_of(runs):
        yield Chart(
            name=slug("quantiles", task),
            title=f"Advantages against N(0, 1): {task}",
            about=(
                "On the grey diagonal the advantages are Gaussian, as G2RPO makes them; a flatter line is a smaller "
                "spread, steps are ties (a line for each third of the run, groups without signal left out)."
            ),
            traces=_quantiles(runs, task),
            layout={"xaxis": {"title": {"text": "quantile of N(0, 1)"}}, "yaxis": {"title": {"text": "advantage"}}},
            needs="recorded rollouts (logger.rollouts)",
        )
    yield Chart(
        name="advantage-distance",
        title="Distance of the advantages from N(0, 1)",
        about=(
            "The 1-Wasserstein distance of a step's advantages from N(0, 1), for each task: 0 is exactly Gaussian; "
            "tied rewards and groups without signal make it larger."
        ),
        traces=by_task(runs, "advantage_normal_distance"),
        layout=axes("distance"),
    )


def _quantiles(runs: Sequence[Measured], task: str) -> list[Trace]:
    traces: list[Trace] = []
    for measured, suffix, dash in each_run(runs):
        for number, found in enumerate(advantage_quantiles(measured.overview, task) if measured.overview else ()):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"steps {found.first} to {found.last}{suffix}",
                    "x": rounded(found.normal.tolist()),
                    "y": rounded(found.found.tolist()),
                    "line": {"color": PALETTE[number], "dash": dash, "width": 1.5},
                    "marker": {"size": 4},
                }
            )
    if not traces:
        return []
    diagonal = {"type": "scatter", "mode": "lines", "name": "N(0, 1)", "x": [-_REACH, _REACH], "y": [-_REACH, _REACH]}
    return [{**diagonal, "line": {"color": TRAINED, "dash": "dot", "width": 1.5}}, *traces]


def signal(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The share of groups all of whose rewards are equal."""
    yield Chart(
        name="zero-variance",
        title="Groups without signal",
        about=(
            "The share of groups whose answers all got the same reward, and so teach nothing: near 1, a task is too "
            "easy, too hard, or its reward too coarse."
        ),
        traces=by_task(runs, "zero_variance_groups"),
        layout=axes("share of groups", yaxis={"title": {"text": "share of groups"}, "range": [-0.02, 1.02]}),
    )


def gradients(runs: Sequence[Measured]) -> Iterator[Chart]:
    """What share of the gradient's norm each task contributes, where it was measured; the norm of the update."""
    traces: list[Trace] = []
    for measured, suffix, _ in each_run(runs[:1]):
        for task, series in measured.run.metrics.of_tasks(tasks_of(runs), "gradient_share").items():
            traces.append(
                {
                    "type": "bar",
                    "name": f"{task}{suffix}",
                    "x": [f"step {step:g}" for step in series.steps],
                    "y": rounded(series.values),
                    "marker": {"color": colour_of(task, runs)},
                }
            )
    yield Chart(
        name="gradient-share",
        title="Gradient share of each task",
        about=(
            "Which task moves the policy: the norm of each task's gradient, as a share of their sum, in the steps that "
            "measured it. Equal heights are balanced tasks." + (" Of the first run." if len(runs) > 1 else "")
        ),
        traces=traces,
        layout={"barmode": "stack", "yaxis": {"title": {"text": "share"}}},
        needs="a step that measured it (grpo.task_gradient_period)",
    )
    yield Chart(
        name="gradient-norm",
        title="Gradient norm",
        about="The norm of the whole gradient before clipping; a spike is a step to look at, a slow rise a warning.",
        traces=of_names(runs, {"train/grad_norm": "gradient norm"}),
        layout=axes("norm"),
    )


def clipping(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The share of tokens that the surrogate clips, and how far the policy moved in a step."""
    yield Chart(
        name="clipping",
        title="Clip fractions",
        about=(
            "The share of response tokens whose probability ratio left the bounds, so that they give no gradient: with "
            "one update a step it is 0, with several a few percent are usual."
        ),
        traces=of_names(
            runs,
            {
                "train/clipped_low": "below the lower bound",
                "train/clipped_high": "above the upper bound",
                "train/clipped_dual": "dual clip",
                "train/importance_truncated": "importance weight truncated",
                "train/importance_masked": "sequence masked",
            },
        ),
        layout=axes("share of tokens", yaxis={"title": {"text": "share of tokens"}, "rangemode": "nonnegative"}),
    )
    yield Chart(
        name="kl",
        title="KL divergence from the old policy",
        about=(
            "How far the policy moved within a step, per token: with one update a step it is 0, far above 0.1 updates "
            "may be too large."
        ),
        traces=of_names(runs, {"train/kl": "KL"}),
        layout=axes("nats", yaxis={"title": {"text": "nats"}, "rangemode": "nonnegative"}),
    )
