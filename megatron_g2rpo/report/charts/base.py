# SPDX-License-Identifier: Apache-2.0
"""What charts are made of: lines of series, bands, and the colours of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_g2rpo.report.metrics import Series
from megatron_g2rpo.report.rollouts import Overview
from megatron_g2rpo.report.run_directory import RunDirectory
from megatron_g2rpo.report.statistics import Band

# Told apart on white and on near-black alike, and by most colour-blind readers in this order.
PALETTE = ("#3b82c4", "#e07b39", "#3f9b5a", "#c44e52", "#8e6bbf", "#2aa6b8", "#b5942a", "#d77fb4", "#8c6d5a", "#7f8c98")
SAMPLED, GREEDY, TRAINED, BOUND = PALETTE[0], PALETTE[1], PALETTE[9], PALETTE[3]
DASHES = ("solid", "dash")  # of the first run, and the second
SMOOTHED_SHARE = 1 / 25  # of the steps that a line's moving average is over

Trace = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run, and what it recorded of its rollouts; None where it recorded none."""

    run: RunDirectory
    overview: Overview | None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart.

    Attributes:
        name: unique on the page, made of letters, digits and dashes.
        title: what it shows.
        about: a sentence that says how it is read.
        traces: plotly's traces; none: the run has no data for it.
        layout: plotly's layout, beside what all charts have.
        needs: what a run must have for it.
    """

    name: str
    title: str
    about: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "metrics that this run has not logged"

    @property
    def has_data(self) -> bool:
        return any(any(value is not None for value in trace["y"]) for trace in self.traces)

    @property
    def points(self) -> int:
        """Number of values of its traces."""
        return sum(len(trace["y"]) for trace in self.traces)


def each_run(runs: Sequence[Measured]) -> Iterator[tuple[Measured, str, str]]:
    """Yield each run with what follows the names of its traces, and the dash of its lines."""
    for number, measured in enumerate(runs):
        yield measured, f" · {measured.run.name}" if len(runs) > 1 else "", DASHES[number]


def tasks_of(runs: Sequence[Measured]) -> list[str]:
    """The tasks of all runs, in the order of the first."""
    return list(dict.fromkeys(task for measured in runs for task in measured.run.tasks))


def colour_of(task: str, runs: Sequence[Measured]) -> str:
    """The colour of a task, the same in every chart."""
    return PALETTE[tasks_of(runs).index(task) % len(PALETTE)]


def line(name: str, series: Series, colour: str, dash: str = "solid", **more: Any) -> Trace:
    """A line through a series; markers, too, where it has few points."""
    few = len(series.steps) <= 30
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": name,
        "x": list(series.steps),
        "y": rounded(series.values),
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 6},
        **more,
    }


def noisy(name: str, series: Series, colour: str, dash: str = "solid") -> list[Trace]:
    """A series as a thin line, and its moving average as a thick one."""
    width = round(len(series.steps) * SMOOTHED_SHARE)
    if width < 2:
        return [line(name, series, colour, dash)]
    raw = line(name, series, colour, dash, opacity=0.3, showlegend=False, legendgroup=name, hoverinfo="skip")
    raw["line"] = {**raw["line"], "width": 1}
    return [raw, line(name, smoothed(series, width), colour, dash, legendgroup=name)]


def smoothed(series: Series, width: int) -> Series:
    """The mean of the values within ``width`` points before and after each."""
    values = np.array([np.nan if value is None else value for value in series.values], dtype=np.float64)
    known = np.isfinite(values)
    window = np.ones(2 * width + 1)
    # "same" would be as long as the window where that is the longer one.
    sums, counts = (np.convolve(each, window)[width:-width] for each in (np.where(known, values, 0.0), known * 1.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, sums / counts, np.nan)
    return Series(steps=series.steps, values=[None if np.isnan(value) else float(value) for value in means])


def band(name: str, found: Band | None, colour: str) -> list[Trace]:
    """The area between the lower and the upper bound of a band."""
    if found is None:
        return []
    steps = found.steps.tolist()
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [*steps, *reversed(steps)],
            "y": rounded([*found.high.tolist(), *reversed(found.low.tolist())]),
            "fill": "toself",
            "fillcolor": f"{colour}33",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "legendgroup": name,
        }
    ]


def level(value: float, colour: str = BOUND, dash: str = "dot") -> dict[str, Any]:
    """A horizontal line through the whole chart, for ``layout.shapes``."""
    where = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    return {**where, "line": {"color": colour, "dash": dash, "width": 1.5}}


def zone(low: float, high: float, colour: str) -> dict[str, Any]:
    """A horizontal stripe through the whole chart, for ``layout.shapes``."""
    where = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high}
    return {**where, "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "layer": "below"}


def by_task(runs: Sequence[Measured], metric: str) -> list[Trace]:
    """A metric of each task, a line each."""
    traces = []
    for measured, suffix, dash in each_run(runs):
        for task, series in measured.run.metrics.of_tasks(tasks_of(runs), metric).items():
            traces += noisy(f"{task}{suffix}", series, colour_of(task, runs), dash)
    return traces


def of_names(runs: Sequence[Measured], names: Mapping[str, str]) -> list[Trace]:
    """Metrics by their full names, each with what the legend calls it; those that a run lacks are left out."""
    traces = []
    for measured, suffix, dash in each_run(runs):
        for number, (name, label) in enumerate(names.items()):
            if series := measured.run.metrics[name]:
                traces += noisy(f"{label}{suffix}", series, PALETTE[number % len(PALETTE)], dash)
    return traces


def axes(y: str, **more: Any) -> dict[str, Any]:
    """The layout of a chart over steps."""
    return {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": y}}, **more}


def slug(*words: str) -> str:
    """A name of letters, digits and dashes. Tasks that differ in other characters alone still get different ones."""
    text = "-".join(words)
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
    return plain if plain == text else f"{plain}-{sum(ord(c) * (i + 1) for i, c in enumerate(text)) % 99991}"


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Values with five digits; None where they are not finite."""
    return [None if value is None or not np.isfinite(value) else float(f"{value:.5g}") for value in values]
