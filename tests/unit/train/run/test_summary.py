# SPDX-License-Identifier: Apache-2.0
"""Claim: a run says where it goes on, that it is finished, and at its end what came of it and where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.summary import begins_at, summary

MakeRecipe = Callable[..., TrainRecipe]
TASKS = "env.tasks={_override_: true, colour: {}, sum: {}}"


def write(run: Path, lines: Mapping[int, Mapping[str, float]]) -> None:
    run.mkdir()
    text = "".join(json.dumps({"step": step, **values}) + "\n" for step, values in lines.items())
    (run / "metrics.jsonl").write_text(text)


def validation(sampled: float, greedy: float) -> dict[str, float]:
    return {
        "val/colour/reward": sampled, "val/colour/greedy_reward": greedy,
        "val/mean_reward": sampled, "val/mean_greedy_reward": greedy,
    }  # fmt: skip


def test_where_a_run_goes_on_is_said_and_that_it_has_ended(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("grpo.max_num_steps=9")
    assert begins_at(recipe, 0) == []
    [on] = begins_at(recipe, 4)
    assert on.startswith("the run goes on after step 4 of 9, from ")
    assert on.endswith("/step_4")
    [ended] = begins_at(recipe, 9)
    assert ended.startswith("the run has taken its 9 steps (")
    assert "set grpo.max_num_steps to more" in ended


def test_before_and_after_are_those_of_the_first_and_the_last_validation(run: Path, make_recipe: MakeRecipe) -> None:
    middle = {"train/loss": 1.0}
    write(run, {0: validation(0.1, 0.2), 1: middle, 2: validation(0.9, 0.9), 3: middle, 4: validation(0.3, 0.6)})
    (run / "hf").mkdir()
    recipe = make_recipe(TASKS, "grpo.max_num_steps=4", "logger.wandb_enabled=true")
    lines = list(summary(recipe, 2, 3725.2))
    assert lines[0] == "done: 4 steps, 2 of them before, 1:02:05 since the start of this process"
    assert lines[1] == "reward of the validation, step 0 -> step 4:"
    assert lines[2] == "  colour  sampled 0.100 -> 0.300   greedy 0.200 -> 0.600"
    assert lines[3] == "  mean    sampled 0.100 -> 0.300   greedy 0.200 -> 0.600", "sum has no validation"
    assert lines[4] == f"in {run}:"
    assert [line.split(":")[0].strip() for line in lines[5:7]] == ["metrics.jsonl", "hf"], (
        "what is not there is not said"
    )
    assert lines[7].endswith("/step_4")
    assert lines[8:] == ["wandb: project megatron-g2rpo"]


def test_a_run_that_never_validated_shows_what_it_has(run: Path, make_recipe: MakeRecipe) -> None:
    write(run, {1: {"train/loss": 2.0}, 2: {"train/loss": 1.5}, 3: {"train/loss": 0.5}})
    assert "train/loss: 2.0000 (step 1) -> 0.5000" in list(summary(make_recipe(TASKS), 0, 1.0))
