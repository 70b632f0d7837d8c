# SPDX-License-Identifier: Apache-2.0
"""The validation metrics of a run per task, before and after training, as one picture and one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_g2rpo.report.metrics import ReportError, read_metrics
from megatron_g2rpo.report.run_directory import REPORT_DIR

PREFIX = "val/"
MEAN = "mean over tasks"


@dataclass(frozen=True)
class Change:
    """The values of a validation metric of one task at the first and the last validation of a run."""

    task: str
    before: float
    after: float


def changes(lines: list[dict[str, float]], metric: str) -> list[Change]:
    """Return the change of ``val/<task>/<metric>`` for every task, and last that of the mean over tasks.

    Raises:
        ReportError: the run has fewer than two validations.
    """
    validations = [line for line in lines if f"{PREFIX}mean_{metric}" in line]
    if len(validations) < 2:
        raise ReportError("the run has fewer than two validations: nothing to compare (grpo.val_at_start, val_at_end)")
    first, last = validations[0], validations[-1]
    # A task's name may have slashes of its own.
    ends = (PREFIX, f"/{metric}")
    tasks = [
        key.removeprefix(ends[0]).removesuffix(ends[1])
        for key in first
        if key.startswith(ends[0]) and key.endswith(ends[1])
    ]
    rows = [Change(task, first[f"{PREFIX}{task}/{metric}"], last[f"{PREFIX}{task}/{metric}"]) for task in tasks]
    return [*rows, Change(MEAN, first[f"{PREFIX}mean_{metric}"], last[f"{PREFIX}mean_{metric}"])]


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
        ReportError: see ``read_metrics`` and ``changes``.
    """
    lines = read_metrics(run)
    rewards = {name: changes(lines, name) for name in ("reward", "greedy_reward", "accuracy", "greedy_accuracy")}
    print(table(rewards, text_only_accuracy(run)))
    target = run / REPORT_DIR / "rewards.png"
    target.parent.mkdir(exist_ok=True)
    _picture(lines, rewards, target)
    return target


def table(rewards: dict[str, list[Change]], text_only: dict[str, float]) -> str:
    """Return the table as text, one line per task, with the accuracy that needs no image where it is known."""
    headings = {name: name.replace("_", " ") for name in rewards}
    width = max(len(change.task) for change in rewards["reward"])
    rows = ["validation, before -> after", "  ".join(["task".ljust(width), *(h.ljust(14) for h in headings.values())])]
    for changed in zip(*rewards.values(), strict=True):
        cells = [f"{change.before:.3f} -> {change.after:.3f}" for change in changed]
        rows.append("  ".join([changed[0].task.ljust(width), *cells]))
    notes = [
        f"{task}: accuracy {text_only[task]:.3f} without looking at the image (a question's commonest training answer)"
        for task in text_only
    ]
    return "\n".join([*rows, *notes])


def _picture(lines: list[dict[str, float]], rewards: dict[str, list[Change]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(2, 1), layout="constrained")
    sampled, greedy = rewards["reward"], rewards["greedy_reward"]
    width = 0.2
    for offset, rows, side, colour, label in (
        (-1.5, sampled, "before", "#b9c9de", "sampled, before"),
        (-0.5, sampled, "after", "#2f5f9e", "sampled, after"),
        (0.5, greedy, "before", "#f3d3b0", "greedy, before"),
        (1.5, greedy, "after", "#d9791e", "greedy, after"),
    ):
        places = [index + offset * width for index in range(len(rows))]
        drawn = bars.bar(places, [getattr(row, side) for row in rows], width, color=colour, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=6.5)
    bars.set_xticks(range(len(sampled)), [row.task.replace("_", "\n") for row in sampled], fontsize=8)
    bars.set_ylabel("validation reward")
    highest = max(max(row.before, row.after) for row in [*sampled, *greedy])
    bars.set_ylim(0, 1.25 * highest or 1.0)  # room for the legend
    bars.legend(fontsize=7, ncols=4, loc="upper center")
    steps = [(line["step"], line["train/reward"]) for line in lines if "train/reward" in line]
    curve.plot(*zip(*steps, strict=True), color="#8a8a8a", linewidth=1, label="train, sampled")
    for metric, colour in (("val/mean_reward", "#2f5f9e"), ("val/mean_greedy_reward", "#d9791e")):
        points = [(line["step"], line[metric]) for line in lines if metric in line]
        curve.plot(*zip(*points, strict=True), marker="o", color=colour, label=metric)
    curve.set_xlabel("step")
    curve.set_ylabel("mean reward")
    curve.legend(fontsize=7, loc="lower right")
    for axis in (bars, curve):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)
    plt.close(figure)
