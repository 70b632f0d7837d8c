# SPDX-License-Identifier: Apache-2.0
"""Claims: metrics.jsonl holds every step once, however often the run was broken off; only rank 0 writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics

MakeRecipe = Callable[..., TrainRecipe]
COLUMNS = (Column("loss", "train/loss", ".4f"), Column("val", "val/mean_reward"))


def log(recipe: TrainRecipe, steps: range, *, enabled: bool = True) -> str:
    """Log the given steps as a run that continues before the first of them; what the console shows."""
    with MetricsLog(recipe.logger, COLUMNS, 9, max(steps.start - 1, 0), enabled=enabled) as metrics:
        metrics.console = Console(file=io.StringIO(), width=40, quiet=not enabled)
        for step in steps:
            metrics.log(StepMetrics(step=step, values={"train/loss": step / 7}))
        return metrics.console.file.getvalue()  # type: ignore[attr-defined]


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(run: Path, make_recipe: MakeRecipe) -> TrainRecipe:
    run.mkdir()
    return make_recipe("logger.tensorboard_enabled=false")


def test_a_line_holds_the_step_and_every_value_to_the_last_bit(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(1, 3))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1 / 7}, {"step": 2, "train/loss": 2 / 7}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(6))
    assert steps(run) == [0, 1, 2, 3, 4, 5]
    log(recipe, range(4, 8))
    assert steps(run) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_a_checkpoint_starts_its_metrics_anew(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(3))
    log(recipe, range(2))
    assert steps(run) == [0, 1]


def test_a_line_that_a_killed_run_did_not_finish_is_dropped(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    log(recipe, range(3, 5))
    assert steps(run) == [0, 1, 2, 3, 4]


def test_other_ranks_write_and_print_nothing(run: Path, recipe: TrainRecipe) -> None:
    assert log(recipe, range(3), enabled=False) == ""
    assert list(run.iterdir()) == []


def test_the_table_shows_a_blank_for_a_metric_that_a_step_lacks(recipe: TrainRecipe) -> None:
    header, row = log(recipe, range(1, 2)).splitlines()
    assert header.split() == ["step", "loss", "val"]
    assert row.split() == ["1", "0.1429"]
