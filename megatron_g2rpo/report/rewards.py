# SPDX-License-Identifier: Apache-2.0
"""The validation metrics of a run per task, before and after training, as one picture and one table."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_g2rpo.report.metrics import ReportError, read_metrics
from megatron_g2rpo.report.run_directory import REPORT_DIR

PREFIX = "val/"
MEAN = "mean over tasks"
METRICS = ("reward", "greedy_reward", "accuracy", "greedy_accuracy")
_CELL = len("0.000 -> 0.000")


@dataclass(frozen=True)
class Change:
    """The values of a validation metric of one task at the first and the last validation of a run.

    One is None where that validation has no value of the task: it was not validated then, or all its rewards failed.
    """

    task: str
    before: float | None
    after: float | None

    @property
    def is_whole(self) -> bool:
        return self.before is not None and self.after is not None


def changes(lines: list[dict[str, float]], metric: str) -> list[Change]:
    """Return the change of ``val/<task>/<metric>`` for every task, and last that of the mean over tasks.

    The mean is that of the tasks which both validations have: means over different tasks do not compare.

    Raises:
        ReportError: the run has fewer than two validations with this metric.
    """
    validations = [line for line in lines if f"{PREFIX}mean_{metric}" in line]
    if len(validations) < 2:
        raise ReportError("the run has fewer than two validations: nothing to compare (grpo.val_at_start, val_at_end)")
    first, last = _by_task(validations[0], metric), _by_task(validations[-1], metric)
    rows = [Change(task, first.get(task), last.get(task)) for task in {**first, **last}]
    both = [task for task in first if task in last]
    means = [sum(values[task] for task in both) / len(both) if both else None for values in (first, last)]
    return [*rows, Change(MEAN, *means)]


def all_changes(lines: list[dict[str, float]]) -> dict[str, list[Change]]:
    """Return metric -> its changes, of the metrics in ``METRICS`` that two validations have; always ``reward``.

    Raises:
        ReportError: the run has fewer than two validations.
    """
    found = {"reward": changes(lines, "reward")}
    for metric in METRICS[1:]:
        # A recipe that does not weigh accuracy has none; of a validation whose rewards all failed there is no mean.
        with contextlib.suppress(ReportError):
            found[metric] = changes(lines, metric)
    return found


def rows_of(rewards: dict[str, list[Change]]) -> dict[str, dict[str, Change]]:
    """Return task -> metric -> its change; the mean over tasks last, and metrics that a task lacks left out."""
    tasks = dict.fromkeys(change.task for found in rewards.values() for change in found if change.task != MEAN)
    rows: dict[str, dict[str, Change]] = {task: {} for task in (*tasks, MEAN)}
    for metric, found in rewards.items():
        for change in found:
            rows[change.task][metric] = change
    return rows


def _by_task(line: dict[str, float], metric: str) -> dict[str, float]:
    """Task -> the metric; a task's name may have slashes of its own."""
    end = f"/{metric}"
    return {
        name.removeprefix(PREFIX).removesuffix(end): value
        for name, value in line.items()
        if name.startswith(PREFIX) and name.endswith(end)
    }


def text_only_accuracy(run: Path) -> dict[str, float]:
    """Return task -> accuracy that needs no image, from the card of the run's validation data; empty without a card.

    The card is ``card.json`` in the folder above the validation shards: ``{"text_only_accuracy": {task: number}}``.
    """
    recipe = run / "recipe.yaml"
    if not recipe.exists():
        return {}
    path = (yaml.safe_load(recipe.read_text())["data"]["validation"] or {}).get("path")
    if not isinstance(path, str):  # none, or several datasets, of which each has a card of its own
        return {}
    card = Path(path).parent / "card.json"
    return json.loads(card.read_text()).get("text_only_accuracy", {}) if card.exists() else {}


def draw(run: Path) -> Path:
    """Print the table of rewards and accuracies, and draw the picture.

    Returns:
        The path of the picture, ``RUN/report/rewards.png``.

    Raises:
        ReportError: matplotlib is not installed; or see ``read_metrics`` and ``changes``.
    """
    if importlib.util.find_spec("matplotlib") is None:  # before anything is printed
        raise ReportError("the picture needs matplotlib, which is not installed: pip install 'megatron-g2rpo[report]'")
    lines = read_metrics(run)
    rewards = all_changes(lines)
    print(table(rewards, text_only_accuracy(run)))
    target = run / REPORT_DIR / "rewards.png"
    target.parent.mkdir(exist_ok=True)
    _picture(lines, rewards, target)
    return target


def table(rewards: dict[str, list[Change]], text_only: dict[str, float]) -> str:
    """Return the table as text, one line per task, with the accuracy that needs no image where it is known."""
    rows = rows_of(rewards)
    width = max(map(len, rows))
    lines = ["validation, before -> after"]
    lines.append("  ".join(["task".ljust(width), *(metric.replace("_", " ").ljust(_CELL) for metric in rewards)]))
    for task, row in rows.items():
        cells = [_cell(row.get(metric)).ljust(_CELL) for metric in rewards]
        lines.append("  ".join([task.ljust(width), *cells]).rstrip())
    lines += [
        f"{task}: lacks a value in the first or the last validation, and is left out of the means of such columns"
        for task, row in rows.items()
        if task != MEAN and not all(change.is_whole for change in row.values())
    ]
    lines += [
        f"{task}: accuracy {value:.3f} without looking at the image (a question's commonest training answer)"
        for task, value in text_only.items()
    ]
    return "\n".join(lines)


def _cell(change: Change | None) -> str:
    if change is None:
        return ""
    return " -> ".join("-".center(5) if value is None else f"{value:.3f}" for value in (change.before, change.after))


def _picture(lines: list[dict[str, float]], rewards: dict[str, list[Change]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(2, 1), layout="constrained")
    rows = rows_of({metric: rewards[metric] for metric in ("reward", "greedy_reward") if metric in rewards})
    width = 0.2
    highest = 0.0
    for offset, metric, side, colour, label in (
        (-1.5, "reward", "before", "#b9c9de", "sampled, before"),
        (-0.5, "reward", "after", "#2f5f9e", "sampled, after"),
        (0.5, "greedy_reward", "before", "#f3d3b0", "greedy, before"),
        (1.5, "greedy_reward", "after", "#d9791e", "greedy, after"),
    ):
        heights = {
            place + offset * width: value
            for place, row in enumerate(rows.values())
            if metric in row and (value := getattr(row[metric], side)) is not None
        }
        drawn = bars.bar(list(heights), list(heights.values()), width, color=colour, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=6.5)
        highest = max(highest, *heights.values())
    bars.set_xticks(range(len(rows)), [task.replace("_", "\n") for task in rows], fontsize=8)
    bars.set_ylabel("validation reward")
    bars.set_ylim(0, 1.25 * highest or 1.0)  # room for the legend
    bars.legend(fontsize=7, ncols=4, loc="upper center")
    steps = [(line["step"], line["train/reward"]) for line in lines if "train/reward" in line]
    if steps:  # supervised training has losses instead
        curve.plot(*zip(*steps, strict=True), color="#8a8a8a", linewidth=1, label="train, sampled")
    for metric, colour in (("val/mean_reward", "#2f5f9e"), ("val/mean_greedy_reward", "#d9791e")):
        points = [(line["step"], line[metric]) for line in lines if metric in line]
        if points:
            curve.plot(*zip(*points, strict=True), marker="o", color=colour, label=metric)
    curve.set_xlabel("step")
    curve.set_ylabel("mean reward")
    curve.legend(fontsize=7, loc="lower right")
    for axis in (bars, curve):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)
    plt.close(figure)
