# SPDX-License-Identifier: Apache-2.0
"""A run directory, as the report reads it: recipe, metrics, recorded rollouts, and where its data is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rpo.report.metrics import Metrics, ReportError, metrics_of, read_metrics

RECIPE_FILE = "recipe.yaml"
REPORT_DIR = "report"


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """What was read of a run directory.

    Attributes:
        path: the directory.
        name: what the page calls the run: the directory's name.
        recipe: the recipe as nested mappings; empty where the directory has none.
        metrics: its series.
        tasks: the names of its tasks, in the recipe's order, and behind them what only the metrics name.
    """

    path: Path
    name: str
    recipe: Mapping[str, Any]
    metrics: Metrics
    tasks: Sequence[str]

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Return a setting of the recipe by its dotted key; no part of the key may have a dot of its own."""
        value: Any = self.recipe
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    def of_task(self, task: str, key: str) -> Any:
        """Return ``env.tasks.<task>.<key>``, or that of ``env.default_task``; None where neither is set."""
        mine = (self.setting("env.tasks") or {}).get(task) or {}
        return mine.get(key) if mine.get(key) is not None else self.setting(f"env.default_task.{key}")

    def reward_weights(self, task: str) -> dict[str, float]:
        """Return reward part -> its weight in the rewards of a task."""
        return {**self.setting("env.reward_weights", {}), **(self.of_task(task, "reward_weights") or {})}


def read_run(path: Path) -> RunDirectory:
    """Read a run directory, of which nothing but ``metrics.jsonl`` must be there.

    Raises:
        ReportError: see ``read_metrics``, or ``recipe.yaml`` is damaged.
    """
    metrics = metrics_of(read_metrics(path))
    recipe = _recipe(path / RECIPE_FILE)
    tasks = list((recipe.get("env") or {}).get("tasks") or {})
    return RunDirectory(
        path=path,
        name=path.resolve().name,
        recipe=recipe,
        metrics=metrics,
        tasks=[*tasks, *(task for task in _measured_tasks(metrics) if task not in tasks)],
    )


def _recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is damaged ({str(error).splitlines()[0]}); restore or remove it") from error
    if not isinstance(recipe, dict):
        raise ReportError(f"{path} is no recipe, but a {type(recipe).__name__}; restore or remove it")
    return recipe


def _measured_tasks(metrics: Metrics) -> list[str]:
    """The tasks that have a reward of their own; a task's name may have slashes."""
    ends = [("train/", "/reward"), ("val/", "/greedy_reward")]
    names = [
        name.removeprefix(start).removesuffix(end)
        for name in metrics.series
        for start, end in ends
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
    ]
    return list(dict.fromkeys(names))
