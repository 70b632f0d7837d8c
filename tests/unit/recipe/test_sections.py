# SPDX-License-Identifier: Apache-2.0
"""`env` and `data`: what a task leaves out, weights by name, response formats."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe import EXEMPLARS
from megatron_g2rpo.recipe.env_section import complete_tasks
from tests.unit.recipe.conftest import Write

EXEMPLAR = EXEMPLARS / "vlm_g2rpo.yaml"


def load(*overrides: str) -> recipe.TrainRecipe:
    return recipe.load(EXEMPLAR, ["env.tasks.mine={}", *overrides], "train")


def failure(*overrides: str) -> str:
    with pytest.raises(recipe.RecipeError) as error:
        load(*overrides)
    return str(error.value)


def test_an_empty_task_is_enough() -> None:
    for nothing in ("{}", "null"):
        env = load(f"env.tasks.mine={nothing}").env
        assert env.tasks == {"mine": env.default_task}
    task = env.default_task
    assert (task.answer_format, task.response_format, task.length, task.reward_weights) == (None, None, None, {})
    assert task.entropy is not None
    assert (task.entropy.low, task.entropy.high) == (0.2, 0.6)


def test_a_task_has_from_the_default_what_it_leaves_out(write: Write) -> None:
    path = write(
        "own.yaml",
        """\
        defaults: vlm_g2rpo.yaml
        env:
          default_task:
            answer_format: exact
            length: {start: 0, peak_start: 4, peak_end: 8, end: 16}
            reward_weights: {length: 0.2, format: 0.3}
          tasks:
            one: {length: {end: 32}, entropy: {low: 0.05}, reward_weights: {length: 0}}
            two: {length: null, entropy: null, answer_format: null}
        """,
    )
    one, two = recipe.load(path, [], "train").env.tasks.values()
    assert one.model_dump() == {
        "answer_format": "exact",
        "response_format": None,
        "length": {"start": 0, "peak_start": 4, "peak_end": 8, "end": 32},
        "entropy": {"low": 0.05, "high": 0.6},
        "reward_weights": {"length": 0, "format": 0.3},
    }
    assert (two.answer_format, two.length, two.entropy) == (None, None, None)
    assert two.reward_weights == {"length": 0.2, "format": 0.3}


@pytest.mark.parametrize(
    "tree", [{}, {"env": None}, {"env": 3}, {"env": {"tasks": {"a": {}}}}, {"env": {"default_task": {}, "tasks": []}}]
)
def test_what_is_no_mapping_is_left_to_validation(tree: dict[str, Any]) -> None:
    assert complete_tasks(tree) == tree


def test_completion_changes_nothing_in_place() -> None:
    tree = {
        "env": {"default_task": {"length": {"end": 1}}, "tasks": {"a": None, "b": 3, "c": {"length": {"start": 0}}}}
    }
    copy = {
        "env": {"default_task": {"length": {"end": 1}}, "tasks": {"a": None, "b": 3, "c": {"length": {"start": 0}}}}
    }
    completed = complete_tasks(tree)["env"]["tasks"]
    assert completed == {"a": {"length": {"end": 1}}, "b": 3, "c": {"length": {"start": 0, "end": 1}}}
    assert tree == copy


def test_a_task_that_is_no_mapping_is_named() -> None:
    assert "'env.tasks.other' must be a mapping of keys, got 3 (int)" in failure("env.tasks.other=3")


def test_a_length_of_which_the_default_has_none_must_be_whole() -> None:
    assert "missing key 'env.tasks.mine.length.start'" in failure("env.tasks.mine.length={end: 32}")


def test_weights_keep_their_order() -> None:
    env = load("env.reward_weights={_override_: true, format: 0.1, overlong: 0.0, accuracy: 1}").env
    assert list(env.reward_weights.items()) == [("format", 0.1), ("overlong", 0.0), ("accuracy", 1.0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.reward_weights={_override_: true}", "'env.reward_weights': Dictionary should have at least 1 item"),
        ("env.reward_weights.length=-1", "'env.reward_weights.length': Input should be greater than or equal to 0"),
        ("env.tasks.mine.reward_weights.length=-1", "'env.tasks.mine.reward_weights.length': Input should be greater"),
        ("env.reward_weights.lenght=1", "unknown reward part 'lenght' (did you mean 'length'?)"),
        ("env.tasks.mine.reward_weights.lenght=1", "unknown reward part 'lenght' (did you mean 'length'?)"),
        ("env.tasks.mine.answer_format=numericc", "unknown answer format 'numericc' (did you mean 'numeric'?)"),
        ("env.tasks.mine.response_format=box", "unknown response format 'box' (did you mean 'boxed'?)"),
        ("data.response_format=thinking", "unknown response format 'thinking'"),
        ("data.response_format=null", "'data.response_format': Input should be a valid string"),
        ("data.format_instruction=1", "'data.format_instruction': Input should be a valid boolean"),
    ],
)
def test_a_wrong_weight_or_name_is_said(override: str, message: str) -> None:
    assert message in failure(override)


def test_the_penalty_of_long_responses_has_one_weight() -> None:
    for where in ("env.reward_weights", "env.tasks.mine.reward_weights"):
        assert load(f"{where}.overlong=0.5").grpo.overlong == "keep"
        message = failure(f"{where}.overlong=0.5", "grpo.overlong=penalise")
        assert "the part 'overlong' would have two weights" in message
        assert f"{where}.overlong (override" in message


def test_groups_are_filtered_by_an_accuracy_that_is_computed() -> None:
    weights = "env.reward_weights={_override_: true, format: 1}"
    sampling = ["grpo.dynamic_sampling.enabled=true", "grpo.dynamic_sampling.filter_low=0.01"]
    load(weights, sampling[0])
    load("env.reward_weights.accuracy=0", *sampling)
    assert "groups are chosen by their mean accuracy, which is not computed" in failure(weights, *sampling)
