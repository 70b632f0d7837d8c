# SPDX-License-Identifier: Apache-2.0
"""Is it learning, on which task, and by which part of the reward?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from megatron_g2rpo.report.charts.base import (
    GREEDY,
    PALETTE,
    SAMPLED,
    TRAINED,
    Chart,
    Measured,
    Trace,
    axes,
    band,
    each_run,
    line,
    noisy,
    slug,
    tasks_of,
)
from megatron_g2rpo.report.metrics import Series
from megatron_g2rpo.report.statistics import reward_band

_CURVES = "grey are training prompts (moving average{band}), blue and orange held-out prompts, sampled and greedy."


def learning_curves(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The reward over all tasks, the accuracy over all tasks, and the reward of each task."""
    yield Chart(
        name="reward",
        title="Mean reward, all tasks",
        about=f"Is it learning? {_curves('reward', runs)}",
        traces=_curve(runs, None, "reward"),
        layout=axes("mean reward"),
    )
    yield Chart(
        name="accuracy",
        title="Mean accuracy, all tasks",
        about=f"Are more answers right? {_curves('accuracy', runs)}",
        traces=_curve(runs, None, "accuracy"),
        layout=axes("mean accuracy"),
    )
    for task in tasks_of(runs):
        yield Chart(
            name=slug("reward", task),
            title=f"Reward: {task}",
            about=_curves("reward of this task", runs),
            traces=_curve(runs, task, "reward"),
            layout=axes("mean reward"),
        )


def _curves(what: str, runs: Sequence[Measured]) -> str:
    recorded = any(each.overview is not None for each in runs) and what != "accuracy"
    return f"The {what}: " + _CURVES.format(band=", 95 % interval of the mean over groups" if recorded else "")


def _curve(runs: Sequence[Measured], task: str | None, metric: str) -> list[Trace]:
    traces: list[Trace] = []
    inner = "" if task is None else f"{task}/"
    held_out = "mean_" if task is None else inner
    for measured, suffix, dash in each_run(runs):
        metrics = measured.run.metrics
        trained = metrics[f"train/{inner}{metric}"]
        if trained and measured.overview is not None and metric == "reward":
            traces += band(f"95 % interval{suffix}", reward_band(measured.overview, task), TRAINED)
        if trained:
            traces += noisy(f"train, sampled{suffix}", trained, TRAINED, dash)
        for prefix, colour, label in (("", SAMPLED, "held out, sampled"), ("greedy_", GREEDY, "held out, greedy")):
            if series := metrics[f"val/{held_out}{prefix}{metric}"]:
                traces.append(line(f"{label}{suffix}", series, colour, dash, mode="lines+markers"))
    return traces


def reward_parts(runs: Sequence[Measured]) -> Iterator[Chart]:
    """The weighted parts of the reward of each task, stacked: their sum is the reward."""
    for task in tasks_of(runs):
        yield Chart(
            name=slug("parts", task),
            title=f"Reward parts: {task}",
            about=(
                "Which part of the reward jumped? The height of a colour is what the part, times its weight, adds to "
                "it (training prompts, moving averages)."
                + (" Lines: the second run's reward." if len(runs) > 1 else "")
            ),
            traces=_stacked(runs, task),
            layout=axes("contribution to the reward"),
        )


def _stacked(runs: Sequence[Measured], task: str) -> list[Trace]:
    traces: list[Trace] = []
    for number, (measured, suffix, dash) in enumerate(each_run(runs)):
        metrics = measured.run.metrics
        total = metrics[f"train/{task}/reward"]
        if number > 0:  # stacks of two runs in one chart cannot be told apart
            traces += noisy(f"reward{suffix}", total, TRAINED, dash) if total else []
            continue
        colours = dict(zip([*measured.run.reward_weights(task), "other"], cycle(PALETTE), strict=False))
        for part, values in contributions(measured, task).items():
            stacked = noisy(f"{part}{suffix}", values, colours[part])[-1]
            traces.append({**stacked, "mode": "lines", "stackgroup": "parts"})
    return traces


def contributions(measured: Measured, task: str) -> dict[str, Series]:
    """Return reward part -> its mean times its weight over the steps of a task.

    What the parts do not add up to (a penalty on the total, or a weight that changed) is ``other``.
    """
    metrics = measured.run.metrics
    total = metrics[f"train/{task}/reward"]
    if not total:
        return {}
    found: dict[str, Series] = {}
    rest = {step: value for step, value in zip(total.steps, total.values, strict=True) if value is not None}
    for part, weight in measured.run.reward_weights(task).items():
        series = metrics[f"train/{task}/{part}"]
        if not series or weight == 0 or not any(series.values):  # a part that the task's samples lack is 0
            continue
        values = [None if value is None else weight * value for value in series.values]
        found[part] = Series(steps=series.steps, values=values)
        for step, value in zip(series.steps, values, strict=True):
            if step in rest and value is not None:
                rest[step] -= value
    if found and any(abs(value) > 1e-6 for value in rest.values()):
        found["other"] = Series(steps=list(rest), values=list(rest.values()))
    return found
