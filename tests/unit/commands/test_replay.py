# SPDX-License-Identifier: Apache-2.0
"""Claims: a replay is set beside the record name by name; keys that it could not heed are refused, others are said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.replay import changed, overrides_for, report
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.schema import RecordError
from tests.common.recipes import G2RPO

RECORDED = {"step": 3, "train/loss": 0.5, "train/kl": math.nan, "time/step": 1.0, "val/mean_reward": 0.5}


def recipe(*overrides: str) -> TrainRecipe:
    return recipes.load(G2RPO, [*overrides, *overrides_for(Path("runs/r"))], "train")


def test_equal_metrics_are_equal_whatever_was_not_measured() -> None:
    replayed = {"train/loss": 0.5, "train/kl": math.nan, "time/step": 9.0, "train/failed_rewards": 0.0}
    assert list(report(RECORDED, replayed, 3)) == ["step 3: all 2 metrics are equal to the record's"]


def test_the_last_bit_counts() -> None:
    lines = list(report(RECORDED, {"train/loss": math.nextafter(0.5, 1.0), "train/kl": math.nan}, 3))
    assert lines[0] == "step 3: 1 of 2 metrics change"
    assert lines[2].split()[0] == "train/loss"


def test_a_metric_that_one_side_lacks_is_a_difference() -> None:
    lines = list(report(RECORDED, {"train/loss": 0.5, "train/new": 1.0}, 3))
    assert [line.split() for line in lines[2:]] == [["train/kl", "nan", "none"], ["train/new", "none", "1"]]


def test_a_step_without_metrics_is_said() -> None:
    lines = list(report(None, {"train/loss": 0.25}, 3))
    assert lines[0].startswith("the run has no metrics of step 3")
    assert lines[1].split() == ["train/loss", "0.25"]


def test_the_same_recipe_has_no_changed_key_though_a_replay_does_less() -> None:
    run = recipes.settings(recipes.load(G2RPO, ["logger.log_dir=elsewhere", "grpo.val_period=7"], "train"))
    assert changed(recipe(), run) == []


def test_a_changed_key_is_said() -> None:
    lines = changed(recipe("loss_fn.ratio_clip_max=0.5"), recipes.settings(recipe()))
    assert len(lines) == 1
    assert lines[0].startswith("loss_fn.")
    assert lines[0].endswith("0.5 here")


@pytest.mark.parametrize(
    "override",
    [
        "policy.generation.temperature=0.5",
        "grpo.seed=5",
        "data.format_instruction=false",
        "grpo.overlong_penalty.buffer=1",
    ],
)
def test_a_key_that_a_replay_cannot_heed_is_refused(override: str) -> None:
    with pytest.raises(RecordError, match=override.partition("=")[0]):
        changed(recipe(override), recipes.settings(recipe()))
