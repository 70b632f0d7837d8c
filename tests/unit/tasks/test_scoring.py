# SPDX-License-Identifier: Apache-2.0
"""Rewards are kept apart, combined once, and never invented where a function fails."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.registry import Registry
from megatron_g2rpo.tasks.response_formats import Tagged
from megatron_g2rpo.tasks.reward_parts import PartSettings
from megatron_g2rpo.tasks.scoring import RewardError, Scoring, read, score
from megatron_g2rpo.types import FailedReward, Response, Rewards, Rollout, Sample
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
    add(registry.reward_parts, "a_judge", _raise(AssertionError("was asked")), batched=True)
    rewards = scored([], make_env({**WEIGHTS, "a_judge": 1.0}))
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

    add(registry.reward_parts, "a_judge", judge, batched=True)
    env = make_env({"format": 0.0}, math=make_task(), ocr=make_task(reward_weights={"a_judge": 1.0}))
    rollouts = [make_rollout("abcd", task="ocr"), make_rollout("abc"), make_rollout("ab", task="ocr")]
    assert scored(rollouts, env).parts["a_judge"].tolist() == [1.0, 0.0, 0.5]
    assert calls == [(["ocr", "ocr"], ["abcd", "ab"], 2)]


# -- what fails --------------------------------------------------------------------------------------------------------


def _raise(error: Exception) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        raise error

    return function


def failure(rewards: Rewards, row: int = 0) -> FailedReward:
    """Why a rollout has no reward; checks that it shows in every value."""
    assert math.isnan(rewards.total[row])
    assert all(math.isnan(part[row]) for part in rewards.parts.values())
    assert rewards.failed[row]
    return rewards.failures[row]


def assert_names(failed: FailedReward, *pieces: str) -> None:
    for piece in pieces:
        assert piece in failed.message


def test_an_answer_format_that_raises_for_an_answer_costs_that_response_its_reward(add: Add) -> None:
    def picky(answer: str, sample: Sample) -> float:
        return float({"": 0.0, "1": 1.0}[answer])

    add(registry.answer_formats, "picky", picky)
    rollouts = [make_rollout(f"<answer>{n}</answer>", answer_format="picky") for n in (1, 2, 1)]
    rewards = scored(rollouts, make_env(WEIGHTS))
    failed = failure(rewards, 1)
    assert (failed.part, failed.bad_sample) == ("accuracy", False)
    assert_names(failed, "reward accuracy 'picky' of", KEY, "'math'", "response 3", "KeyError: '2'")
    assert rewards.failed.tolist() == [False, True, False]
    assert rewards.total[[0, 2]].tolist() == [0.9, 0.9], "the others have theirs"


def test_a_part_that_raises_costs_the_response_its_reward(add: Add) -> None:
    asked: list[str] = []
    add(registry.reward_parts, "explodes", _raise(KeyError("no such thing")))
    add(registry.reward_parts, "later", lambda sample, response: float(asked.append(response.text) or 1))
    failed = failure(scored([make_rollout("")], make_env({"explodes": 1.0, "later": 1.0})))
    assert failed.part == "explodes"
    assert_names(failed, "reward explodes of", KEY, "'math'", "response 3", "KeyError: 'no such thing'")
    assert not asked, "one failure is enough"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_no_reward(add: Add, value: float) -> None:
    add(registry.answer_formats, "odd", lambda answer, sample: value)
    failed = failure(scored([make_rollout("<answer>1</answer>", answer_format="odd")], make_env(WEIGHTS)))
    assert re.match(rf"reward accuracy 'odd' of sample {KEY}.*not a finite number", failed.message)


def test_a_value_that_is_no_number_is_no_reward(add: Add) -> None:
    add(registry.reward_parts, "wordy", lambda sample, response: "good")
    failed = failure(scored([make_rollout("")], make_env({"wordy": 1.0})))
    assert re.match(rf"reward wordy of sample {KEY}.*ValueError.*'good'", failed.message)


def test_a_batched_part_that_raises_has_failed_for_all_responses(add: Add) -> None:
    add(registry.reward_parts, "judge_", _raise(ConnectionError("no judge")), batched=True)
    rewards = scored([make_rollout(""), make_rollout("")], make_env({"judge_": 1.0, "format": 1.0}))
    for row in (0, 1):
        assert_names(
            failure(rewards, row), f"reward judge_ of sample {KEY}", "ConnectionError: no judge", "2 responses"
        )


def test_a_batched_part_may_fail_for_single_responses(add: Add) -> None:
    def judge(samples: list[Sample], responses: list[Response]) -> list[Any]:
        return [0.5, float("nan"), TimeoutError("it slept"), torch.tensor(1.0)]

    add(registry.reward_parts, "judge_", judge, batched=True)
    rollouts = [make_rollout("", key=f"s/{number}") for number in range(4)]
    rewards = scored(rollouts, make_env({"judge_": 1.0}))
    assert rewards.failed.tolist() == [False, True, True, False]
    assert_names(failure(rewards, 1), "sample s/1", "returned nan")
    assert_names(failure(rewards, 2), "sample s/2", "TimeoutError: it slept")
    assert rewards.total[[0, 3]].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "returned 1 numbers for 2 responses"), ("no", "returned str"), (None, "TypeError")],
)
def test_a_batched_part_returns_a_number_for_each_response(add: Add, returned: Any, message: str) -> None:
    add(registry.reward_parts, "short", lambda samples, responses: returned, batched=True)
    rewards = scored([make_rollout(""), make_rollout("")], make_env({"short": 1.0}))
    assert_names(failure(rewards, 1), message)


def test_a_response_format_that_raises_costs_the_response_its_reward(add: Add) -> None:
    class Broken(Tagged):
        def find_answer(self, text: str) -> str | None:
            if not text:
                raise IndexError("no such group")
            return super().find_answer(text)

    add(registry.response_formats, "broken", Broken(thinking="a", answer="answer"))
    env = make_env(WEIGHTS)
    failed = read(make_rollout(""), env, "broken")
    assert isinstance(failed, FailedReward)
    assert re.match(rf"response format 'broken' of sample {KEY}.*response 3: raised IndexError", failed.message)
    rewards = scored([make_rollout("<answer>12</answer>"), make_rollout("")], env, response_format="broken")
    assert failure(rewards, 1) == failed
    assert rewards.parts["accuracy"][0] == 1.0


def test_failures_follow_their_rollouts() -> None:
    failed = [FailedReward(part="a", message=str(number)) for number in range(2)]
    one = Rewards(parts={}, weights={}, total=torch.zeros(3), failures={0: failed[0], 2: failed[1]})
    assert one[torch.tensor([2, 1])].failures == {0: failed[1]}
    assert one[torch.tensor([False, True, True])].failures == {1: failed[1]}
    both = Rewards.concatenate([one, one[torch.tensor([1, 0])]])
    assert both.failures == {0: failed[0], 2: failed[1], 4: failed[0]}
    assert both.plus("b", torch.zeros(5), 1.0).failed.tolist() == [True, False, True, False, True]
    assert Rewards.none(2).failed.tolist() == [False, False]


# -- what ends the run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<answer>12</answer>", "no answer at all"])
def test_a_broken_reference_is_an_error_whatever_the_response(text: str) -> None:
    with pytest.raises(RewardError, match=rf"{KEY}.*reference answer 'a dozen' is not a number"):
        scored([make_rollout(text, answer="a dozen")], make_env(WEIGHTS))


def test_a_broken_reference_costs_the_reward_where_bad_samples_are_skipped() -> None:
    rollouts = [make_rollout("<answer>12</answer>", answer="a dozen"), make_rollout("<answer>12</answer>")]
    rewards = scored(rollouts, make_env(WEIGHTS), on_bad_sample="skip")
    assert failure(rewards).bad_sample
    assert rewards.failed.tolist() == [True, False]


def test_an_unknown_answer_format_is_an_error_that_names_the_sample() -> None:
    with pytest.raises(RewardError, match=rf"{KEY}.*unknown answer format 'iou'"):
        scored([make_rollout("<answer>12</answer>", answer_format="iou")], make_env(WEIGHTS))


def test_a_task_that_the_recipe_does_not_list_is_an_error() -> None:
    with pytest.raises(RewardError, match=rf"{KEY}: task 'ocr' is not listed under env.tasks"):
        scored([make_rollout("x", task="ocr")], make_env(WEIGHTS))


def test_more_failures_than_may_be_end_the_scoring_at_once(add: Add) -> None:
    asked: list[str] = []

    def fails(sample: Sample, response: Response) -> float:
        asked.append(sample.key)
        raise OSError("gone")

    add(registry.reward_parts, "fails", fails)
    scoring = Scoring(make_env({"fails": 1.0}), response_format="thinking_answer", max_response_tokens=9)
    rollouts = [make_rollout("", key=f"s/{number}") for number in range(9)]
    with pytest.raises(RewardError, match=r"(?s)3 rewards, more than .*\(fails 3\).*sample s/0.*OSError: gone"):
        scoring.rewards(rollouts, most_failures=2)
    assert asked == ["s/0", "s/1", "s/2"]


def test_an_option_of_the_recipe_reaches_its_part(add: Add) -> None:
    def scaled(sample: Sample, response: Response, *, scale: float = 1.0) -> float:
        return scale * response.num_tokens

    add(registry.reward_parts, "scaled", scaled)
    env = make_env({"scaled": 1.0})
    assert scored([make_rollout("", num_tokens=4)], env).total.item() == 4.0
    env = env.model_copy(update={"reward_options": {"scaled": {"scale": 0.5}}})
    assert scored([make_rollout("", num_tokens=4)], env).total.item() == 2.0
