# SPDX-License-Identifier: Apache-2.0
"""What a run has measured: the lines of ``metrics.jsonl`` as one series a metric."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
MOST_POINTS = 1000  # of a curve: more than a screen has pixels to show


class ReportError(ValueError):
    """A file of the run directory is missing or damaged, or there is nothing to report."""


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the lines of a run's ``metrics.jsonl``.

    Raises:
        ReportError: there is no such file, it is empty, or a line of it is damaged; names the line.
    """
    path = run / METRICS_FILE
    if not path.exists():
        raise ReportError(f"{path} does not exist; {run} is not the directory of a run")
    lines = []
    # What follows the last line's end is one that the run is writing, or was killed at.
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ReportError(f"{path}, line {number}: {text[:40]!r} is no JSON; remove the line") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ReportError(f"{path}, line {number}: {text[:40]!r} has no step; remove the line")
        lines.append(line)
    if not lines:
        raise ReportError(f"{path} is empty: the run has not finished a step")
    return lines


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve.

    Attributes:
        steps: the steps that it has a value of, in order; where points were joined, the middle of each bin.
        values: a number for each; None where it is not finite.
    """

    steps: Sequence[float]
    values: Sequence[float | None]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The series of a run, by the names of its metrics.

    Attributes:
        series: name -> its curve, of at most ``MOST_POINTS`` points.
        last_step: the last step that was logged.
        bin_size: steps that one point is the mean of; 1 where none were joined.
    """

    series: Mapping[str, Series]
    last_step: int
    bin_size: int = 1

    def __getitem__(self, name: str) -> Series:
        return self.series.get(name, Series(steps=(), values=()))

    def of_tasks(self, tasks: Iterable[str], name: str, prefix: str = "train") -> dict[str, Series]:
        """Return task -> ``<prefix>/<task>/<name>`` for the tasks that have it."""
        found = {task: self[f"{prefix}/{task}/{name}"] for task in tasks}
        return {task: series for task, series in found.items() if series}


def metrics_of(lines: Sequence[Mapping[str, Any]]) -> Metrics:
    """Turn the lines of ``metrics.jsonl`` into series; one that is longer than ``MOST_POINTS`` is averaged over bins.

    Validations are few and are never averaged.
    """
    last_step = max(line["step"] for line in lines)
    bin_size = max(1, math.ceil((last_step + 1) / MOST_POINTS))
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((line["step"], float(value)))
    series = {
        name: _series(sorted(found), bin_size if len(found) > MOST_POINTS else 1) for name, found in points.items()
    }
    return Metrics(series=series, last_step=last_step, bin_size=bin_size)


def _series(points: Sequence[tuple[int, float]], bin_size: int) -> Series:
    if bin_size == 1:
        return Series(steps=[step for step, _ in points], values=[_finite(value) for _, value in points])
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        bins.setdefault(step // bin_size, []).append((step, value))
    means = [[sum(column) / len(held) for column in zip(*held, strict=True)] for held in bins.values()]
    return Series(steps=[step for step, _ in means], values=[_finite(value) for _, value in means])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
