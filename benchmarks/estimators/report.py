# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the runs in ``results/``.

python benchmarks/estimators/report.py          # tables to standard output, pictures to docs/estimators/
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from conditions import ARMS, STEPS

RESULTS = Path(__file__).parent / "results"
PICTURES = Path("docs/estimators")


@dataclass(frozen=True)
class Run:
    """One run's metrics.

    Attributes:
        seed: of the run.
        series: metric -> the steps that logged it, and its values.
    """

    seed: int
    series: dict[str, tuple[list[float], list[float]]]

    def first(self, key: str) -> float:
        """The first value of a metric."""
        return self.series[key][1][0]

    def last(self, key: str) -> float:
        """The last value of a metric."""
        return self.series[key][1][-1]

    def area(self, key: str) -> float:
        """Area under a metric's curve over the run's steps, divided by their number: its mean level."""
        steps, values = self.series[key]
        return float(np.trapezoid(values, steps)) / (steps[-1] - steps[0])

    def mean(self, key: str) -> float:
        """Mean of a metric over the steps that logged it."""
        return statistics.fmean(self.series[key][1])


Runs = dict[str, dict[str, list[Run]]]


def read() -> Runs:
    """Condition -> arm -> runs by seed, in the order of ``conditions.ARMS``."""
    found: Runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("*.json")):
        result: Any = json.loads(path.read_text())
        found[result["condition"]][result["arm"]].append(Run(result["seed"], result["series"]))
    return {
        condition: {
            arm.name: found[condition][arm.name]
            for arm in ARMS
            if arm.condition == condition and found[condition][arm.name]
        }
        for condition in dict.fromkeys(arm.condition for arm in ARMS)
        if condition in found
    }


def spread(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 3) -> str:
    """Mean over runs, and their range."""
    values = [value(run) for run in runs]
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def tasks_of(runs: Runs) -> list[str]:
    """Tasks, from the validations."""
    run = next(iter(next(iter(runs.values())).values()))[0]
    return sorted({key.split("/")[1] for key in run.series if key.endswith("/greedy_reward")})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def rewards(runs: Runs, tasks: Sequence[str]) -> None:
    """Final and mean level of the validation reward, over tasks and per task."""
    for condition, arms in runs.items():
        counts = {len(of_arm) for of_arm in arms.values()}
        start = spread(next(iter(arms.values())), lambda run: run.first("val/mean_reward"))
        print(f"\n## {condition}: validation reward after {STEPS} steps ({counts} seeds; before: {start})\n")
        # Accuracy is what arms with other rewards have in common.
        kinds = (("sampled", "val/mean_reward"), ("greedy", "val/mean_greedy_reward"))
        accuracies = ("val/mean_accuracy", "val/mean_greedy_accuracy")
        rows = [
            [name]
            + [spread(of_arm, lambda run, key=key: run.last(key)) for _, key in kinds]
            + [spread(of_arm, lambda run, key=key: run.area(key)) for _, key in kinds]
            + [spread(of_arm, lambda run, key=key: run.last(key)) for key in accuracies]
            for name, of_arm in arms.items()
        ]
        header = ["arm", "sampled", "greedy", "sampled, mean level", "greedy, mean level"]
        print(table([*header, "accuracy, sampled", "accuracy, greedy"], rows))
        rows = [
            [name] + [spread(of_arm, lambda run, task=task: run.last(f"val/{task}/reward")) for task in tasks]
            for name, of_arm in arms.items()
        ]
        print("\n" + table(["arm: final, sampled", *tasks], rows))
        rows = [
            [name] + [spread(of_arm, lambda run, task=task: run.area(f"val/{task}/reward")) for task in tasks]
            for name, of_arm in arms.items()
        ]
        print("\n" + table(["arm: mean level, sampled", *tasks], rows))


def gradients(runs: Runs, tasks: Sequence[str]) -> None:
    """Share of each task in the gradient, and how far shares are apart."""
    for condition, arms in runs.items():
        print(f"\n## {condition}: share of the gradient's norm by task\n")
        rows = []
        for name, of_arm in arms.items():
            shares = [statistics.fmean(run.mean(f"train/{task}/gradient_share") for run in of_arm) for task in tasks]
            rows.append([name, *(f"{share:.3f}" for share in shares), f"{max(shares) / min(shares):.1f}"])
        print(table(["arm", *tasks, "largest / smallest"], rows))
        rows = []
        for name, of_arm in arms.items():
            spreads = [statistics.fmean(run.mean(f"train/{task}/advantage_std") for run in of_arm) for task in tasks]
            norm = statistics.fmean(run.mean("train/grad_norm") for run in of_arm)
            rows.append([name, *(f"{value:.3f}" for value in spreads), f"{norm:.3f}"])
        print("\n" + table(["arm: std of advantages", *tasks, "gradient norm"], rows))


def shaping(runs: Runs, tasks: Sequence[str]) -> None:
    """Entropy and length at the end of the run."""
    print("\n## Entropy (nats) and response tokens, mean of the last five steps\n")
    chosen = [("plain", "g2rpo"), ("shaping", "off"), ("rate", "bounds on"), ("rate", "bounds off")]
    for metric in ("entropy", "response_tokens"):
        rows = []
        for condition, name in chosen:
            of_arm = runs.get(condition, {}).get(name)
            if of_arm is None:
                continue
            cells = []
            for task in tasks:
                ends = [statistics.fmean(run.series[f"train/{task}/{metric}"][1][-5:]) for run in of_arm]
                cells.append(f"{statistics.fmean(ends):.2f} ({min(ends):.2f}-{max(ends):.2f})")
            rows.append([f"{condition}, {name}", *cells])
        print("\n" + table([metric, *tasks], rows))


def pictures(runs: Runs, tasks: Sequence[str]) -> None:
    """Curves of rewards, entropies and lengths; bars of gradient shares."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    shown = [condition for condition in ("plain", "heavy") if condition in runs]
    figure, axes = plt.subplots(2, len(shown), figsize=(6 * len(shown), 8), squeeze=False)
    for column, condition in enumerate(shown):
        for name, of_arm in runs[condition].items():
            steps = of_arm[0].series["val/mean_reward"][0]
            curves = np.array([run.series["val/mean_reward"][1] for run in of_arm])
            (line,) = axes[0, column].plot(steps, curves.mean(0), label=name)
            axes[0, column].fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.12)
        axes[0, column].set(title=f"{condition}: validation reward, sampled", xlabel="step")
        axes[0, column].legend(fontsize=8)
        width = 0.8 / len(runs[condition])
        for number, (name, of_arm) in enumerate(runs[condition].items()):
            shares = [statistics.fmean(run.mean(f"train/{task}/gradient_share") for run in of_arm) for task in tasks]
            axes[1, column].bar(np.arange(len(tasks)) + number * width, shares, width, label=name)
        axes[1, column].set_xticks(np.arange(len(tasks)) + 0.4, [task.replace("_", "\n") for task in tasks], fontsize=8)
        axes[1, column].axhline(1 / len(tasks), color="black", linewidth=0.8, linestyle=":")
        axes[1, column].set(title=f"{condition}: share of the gradient's norm")
    figure.tight_layout()
    figure.savefig(PICTURES / "estimators.png", dpi=110)

    arms = [("plain", "g2rpo"), ("shaping", "off"), ("rate", "bounds on"), ("rate", "bounds off")]
    figure, axes = plt.subplots(2, len(tasks), figsize=(3 * len(tasks), 6), sharex=True)
    for column, task in enumerate(tasks):
        for condition, name in arms:
            of_arm = runs.get(condition, {}).get(name)
            if of_arm is None:
                continue
            for row, metric in enumerate(("entropy", "response_tokens")):
                series = [run.series[f"train/{task}/{metric}"] for run in of_arm]
                steps, curves = series[0][0], np.array([values for _, values in series])
                (line,) = axes[row, column].plot(steps, curves.mean(0), label=f"{condition}, {name}", linewidth=1)
                axes[row, column].fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.12)
        axes[0, column].axhspan(0.2, 0.6, color="grey", alpha=0.12)
        axes[0, column].set_title(task, fontsize=9)
    axes[0, 0].set_ylabel("entropy, nats")
    axes[1, 0].set_ylabel("response tokens")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURES / "shaping.png", dpi=110)


def main() -> None:
    """Print the tables and draw the pictures."""
    runs = read()
    tasks = tasks_of(runs)
    rewards(runs, tasks)
    gradients(runs, tasks)
    shaping(runs, tasks)
    pictures(runs, tasks)


if __name__ == "__main__":
    main()
