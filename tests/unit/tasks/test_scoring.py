# SPDX-License-Identifier: Apache-2.0
"""Rewards are kept apart, combined once, and never invented where a function fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.registry import Registry
from megatron_g2rpo.tasks.response_formats import Tagged
from megatron_g2rpo.tasks.reward_parts import PartSettings
from megatron_g2rpo.tasks.scoring import RewardError, read, score
from megatron_g2rpo.types import Response, Rewards, Rollout, Sample
from tests.unit.tasks.common import BOUNDS, make_env, make_rollout, make_task

WEIGHTS = {"accuracy": 0.9, "format": 0.1, "structure": 0.25, "length": 0.5}
KEY = "shard-000001/train-000007"

Add = Callable[..., None]


@pytest.fixture
def add() -> Iterator[Add]:
    """Register something for one test."""
    added: list[tuple[Registry[Any], str]] = []

    def add(kind: Registry[Any], name: str, value: Any, **facts: Any) -> None:
        kind.register(name, **facts)(value)
        added.append((kind, name))

    yield add
    for kind, name in added:
        del kind._entries[name]


def scored(rollouts: list[Rollout], env: Env, **changes: Any) -> Rewards:
    return score(rollouts, env, **({"response_format": "thinking_answer", "max_response_tokens": 99} | changes))


def test_parts_are_unweighted_and_the_total_is_their_weighted_sum() -> None:
    box = {"answer": "[1, 2, 3, 4]", "answer_format": "box_iou"}
    rollouts = [
        make_rollout("<thinking>so</thinking><answer>[1, 2, 3, 4]</answer>", num_tokens=6, **box),
        make_rollout("<thinking>so</thinking><answer>[5, 6, 7]</answer>", num_tokens=12, **box),
        make_rollout("<answer>[1, 2, 3, 4]</answer>", num_tokens=2, **box),
        make_rollout("[1, 2, 3, 4]", num_tokens=99, **box),
    ]
    rewards = scored(rollouts, make_env(WEIGHTS, math=make_task(length=BOUNDS)))
    assert list(rewards.parts) == list(rewards.weights) == list(WEIGHTS)
    assert rewards.parts["accuracy"].tolist() == [1, 0, 1, 0]
    assert rewards.parts["format"].tolist() == [1, 1, 0, 0]
    assert rewards.parts["structure"].tolist() == [1, 0, 0, 0]
    assert rewards.parts["length"].tolist() == [1, 0.5, 0.5, 0]
    assert all(part.dtype == torch.float64 for part in (*rewards.parts.values(), rewards.total))
    assert {name: weight.tolist() for name, weight in rewards.weights.items()} == {
        name: [weight] * 4 for name, weight in WEIGHTS.items()
    }
    # Four products and sums of numbers near 1 in float64.
    assert rewards.total.tolist() == pytest.approx([1.75, 0.1 + 0.25, 1.15, 0.0], abs=1e-15)


def test_the_sum_is_added_up_in_the_order_of_the_weights(add: Add) -> None:
    """0.1 + 0.2 + 0.3 rounds otherwise than 0.3 + 0.2 + 0.1: a run is repeated bit for bit only in one order."""
    for name in ("a", "b", "c"):
        add(registry.reward_parts, name, lambda sample, response: 1.0)
    one = scored([make_rollout("")], make_env({"a": 0.1, "b": 0.2, "c": 0.3})).total
    other = scored([make_rollout("")], make_env({"c": 0.3, "b": 0.2, "a": 0.1})).total
    assert (one.item(), other.item()) == (0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1)
    assert one.item() != other.item()


def test_a_part_of_weight_zero_is_a_metric_only() -> None:
    rewards = scored([make_rollout("<answer>12</answer>")], make_env({"accuracy": 0.0, "format": 1.0}))
    assert rewards.parts["accuracy"].tolist() == [1.0]
    assert rewards.total.tolist() == [0.0]


def test_only_parts_that_are_weighed_are_computed(add: Add) -> None:
    add(registry.reward_parts, "unasked", _raise(AssertionError("was asked")))
    assert list(scored([make_rollout("")], make_env({"format": 1.0})).parts) == ["format"]


def test_a_task_may_weigh_parts_otherwise(add: Add) -> None:
    add(registry.reward_parts, "own", lambda sample, response: 1.0 if sample.task == "ocr" else float("nan"))
    env = make_env(
        {"format": 0.5, "accuracy": 1.0},
        math=make_task(),
        ocr=make_task(reward_weights={"accuracy": 0.25, "own": 2.0}),
    )
    good = "<thinking></thinking><answer>12</answer>"
    rewards = scored([make_rollout(good), make_rollout(good, task="ocr")], env)
    assert {name: weight.tolist() for name, weight in rewards.weights.items()} == {
        "format": [0.5, 0.5],
        "accuracy": [1.0, 0.25],
        "own": [0.0, 2.0],
    }
    # Where no weight names it a part is not computed: it would have been an error here.
    assert rewards.parts["own"].tolist() == [0.0, 1.0]
    assert rewards.total.tolist() == [1.5, 2.75]


def test_the_penalty_of_long_responses_is_added_last() -> None:
    env = make_env({"format": 1.0}, math=make_task(reward_weights={"accuracy": 1.0}))
    rewards = scored(
        [make_rollout("", num_tokens=n) for n in (4, 9)],
        env,
        max_response_tokens=10,
        overlong_buffer=4,
        overlong_weight=0.5,
    )
    assert list(rewards.parts) == ["format", "accuracy", "overlong"]
    assert rewards.parts["overlong"].tolist() == [0.0, -0.75]
    assert rewards.total.tolist() == [0.0, -0.375]


def test_a_task_s_formats_stand_in_for_the_recipe_s_and_the_sample_s() -> None:
    rollouts = [make_rollout("so \\boxed{10}", answer="20")]
    weights = {"accuracy": 1.0}
    assert scored(rollouts, make_env(weights)).parts["accuracy"].item() == 0.0
    relative = make_env(weights, math=make_task(answer_format="relative"))
    assert scored(rollouts, relative).parts["accuracy"].item() == 0.0
    assert scored(rollouts, relative, response_format="boxed").parts["accuracy"].item() == 0.5
    boxed = make_env(weights, math=make_task(answer_format="relative", response_format="boxed"))
    assert scored(rollouts, boxed).parts["accuracy"].item() == 0.5


def test_an_opening_tag_of_the_prompt_is_read_with_the_response() -> None:
    rollout = make_rollout("so</think><answer>12</answer>", prefix="<think>\n")
    rewards = scored([rollout], make_env({"format": 1.0}), response_format="think_answer")
    assert rewards.parts["format"].tolist() == [1.0]


def test_no_rollouts_give_no_rewards(add: Add) -> None:
    add(registry.reward_parts, "judge", _raise(AssertionError("was asked")), batched=True)
    rewards = scored([], make_env({**WEIGHTS, "judge": 1.0}))
    assert rewards.total.shape == (0,)
    assert len(rewards.parts) == 5
    assert all(part.shape == (0,) for part in (*rewards.parts.values(), *rewards.weights.values()))


# -- parts of a user's own ---------------------------------------------------------------------------------------------


def test_a_part_sees_the_sample_the_response_and_what_the_recipe_says(add: Add) -> None:
    seen: list[tuple[Sample, Response, PartSettings]] = []

    def own(sample: Sample, response: Response, *, settings: PartSettings) -> float:
        seen.append((sample, response, settings))
        return sample.extra["difficulty"]

    add(registry.reward_parts, "own", own)
    rollout = make_rollout("<thinking>a</thinking><answer>b</answer>", num_tokens=5, extra={"difficulty": 0.75})
    env = make_env({"own": 2.0}, math=make_task(length=BOUNDS, answer_format="exact"))
    assert scored([rollout], env, max_response_tokens=64, overlong_buffer=8).total.tolist() == [1.5]
    ((sample, response, settings),) = seen
    assert sample is rollout.prompt.sample
    assert response == Response(
        text=rollout.text, thinking="a", answer="b", is_well_formed=True, num_tokens=5, truncated=False, sample_index=3
    )
    assert settings == PartSettings(answer_format="exact", length=BOUNDS, max_response_tokens=64, overlong_buffer=8)


def test_a_batched_part_is_called_once_with_the_samples_whose_tasks_name_it(add: Add) -> None:
    calls: list[tuple[list[str], list[str], int]] = []

    def judge(samples: list[Sample], responses: list[Response], *, settings: list[PartSettings]) -> list[float]:
        calls.append(([s.task for s in samples], [r.text for r in responses], len(settings)))
        return [len(r.text) / 4 for r in responses]

    add(registry.reward_parts, "judge", judge, batched=True)
    env = make_env({"format": 0.0}, math=make_task(), ocr=make_task(reward_weights={"judge": 1.0}))
    rollouts = [make_rollout("abcd", task="ocr"), make_rollout("abc"), make_rollout("ab", task="ocr")]
    assert scored(rollouts, env).parts["judge"].tolist() == [1.0, 0.0, 0.5]
    assert calls == [(["ocr", "ocr"], ["abcd", "ab"], 2)]


# -- errors ------------------------------------------------------------------------------------------------------------


def _raise(error: Exception) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        raise error

    return function


def assert_names(error: BaseException, *pieces: str) -> None:
    for piece in pieces:
        assert piece in str(error)


def test_an_answer_format_that_raises_is_named_with_its_sample_and_its_cause(add: Add) -> None:
    add(registry.answer_formats, "explodes", _raise(KeyError("no such thing")))
    with pytest.raises(RewardError) as caught:
        scored([make_rollout("<answer>1</answer>", answer_format="explodes")], make_env(WEIGHTS))
    assert_names(
        caught.value, "reward accuracy 'explodes' of", KEY, "'math'", "response 3", "KeyError: 'no such thing'"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_part_that_raises_is_named_with_its_sample_and_its_cause(add: Add) -> None:
    add(registry.reward_parts, "explodes", _raise(KeyError("no such thing")))
    with pytest.raises(RewardError) as caught:
        scored([make_rollout("")], make_env({"explodes": 1.0}))
    assert_names(caught.value, "reward explodes of", KEY, "'math'", "response 3", "KeyError: 'no such thing'")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(add: Add, value: float) -> None:
    add(registry.answer_formats, "odd", lambda answer, sample: value)
    with pytest.raises(RewardError, match=rf"accuracy 'odd' of sample {KEY}.*not a finite number"):
        scored([make_rollout("<answer>1</answer>", answer_format="odd")], make_env(WEIGHTS))


def test_a_reward_that_is_no_number_is_an_error(add: Add) -> None:
    add(registry.reward_parts, "wordy", lambda sample, response: "good")
    with pytest.raises(RewardError, match=rf"reward wordy of sample {KEY}.*ValueError.*'good'"):
        scored([make_rollout("")], make_env({"wordy": 1.0}))


def test_a_batched_part_that_raises_names_its_first_sample(add: Add) -> None:
    add(registry.reward_parts, "judge", _raise(ConnectionError("no judge")), batched=True)
    with pytest.raises(RewardError, match=rf"judge of 2 samples, the first of which is {KEY}: raised Conn.*no judge"):
        scored([make_rollout(""), make_rollout("")], make_env({"judge": 1.0}))


def test_a_batched_part_returns_a_finite_number_for_each_response(add: Add) -> None:
    add(registry.reward_parts, "short", lambda samples, responses: [1.0], batched=True)
    with pytest.raises(RewardError, match=r"short of 2 samples.* returned 1 numbers"):
        scored([make_rollout(""), make_rollout("")], make_env({"short": 1.0}))
    add(registry.reward_parts, "odd", lambda samples, responses: torch.tensor([1.0, float("nan")]), batched=True)
    rollouts = [make_rollout(""), make_rollout("", key="shard-000002/bad")]
    with pytest.raises(RewardError, match=r"reward odd of sample shard-000002/bad.* returned nan"):
        scored(rollouts, make_env({"odd": 1.0}))


def test_a_response_format_that_raises_is_named_with_its_sample(add: Add) -> None:
    class Broken(Tagged):
        def find_answer(self, text: str) -> str | None:
            raise IndexError("no such group")

    add(registry.response_formats, "broken", Broken(thinking="a", answer="b"))
    with pytest.raises(RewardError, match=rf"response format 'broken' of sample {KEY}.*response 3: raised IndexError"):
        read(make_rollout(""), make_env(WEIGHTS), "broken")


@pytest.mark.parametrize("text", ["<answer>12</answer>", "no answer at all"])
def test_a_broken_reference_is_an_error_whatever_the_response(text: str) -> None:
    with pytest.raises(RewardError, match=rf"{KEY}.*reference answer 'a dozen' is not a number"):
        scored([make_rollout(text, answer="a dozen")], make_env(WEIGHTS))


def test_an_unknown_answer_format_is_an_error_that_names_the_sample() -> None:
    with pytest.raises(RewardError, match=rf"{KEY}.*unknown answer format 'iou'"):
        scored([make_rollout("<answer>12</answer>", answer_format="iou")], make_env(WEIGHTS))


def test_a_task_that_the_recipe_does_not_list_is_an_error() -> None:
    with pytest.raises(RewardError, match=rf"{KEY}: task 'ocr' is not listed under env.tasks"):
        scored([make_rollout("x", task="ocr")], make_env(WEIGHTS))
