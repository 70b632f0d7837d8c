# SPDX-License-Identifier: Apache-2.0
"""Claims: a prompt is counted with all its responses or not at all, and who is at fault is told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_g2rpo.commands.eval.lines import Lines, lines_of, too_many
from megatron_g2rpo.types import FailedReward, Rewards, Rollout
from tests.unit.tasks.common import make_env, make_rollout

PART = FailedReward(part="judge", message="reward judge of sample s1: raised")
REFERENCE = FailedReward(part="accuracy", message="the reference of s3 cannot be read", bad_sample=True)


def rollouts(places: list[int], samples: int) -> list[Rollout]:
    return [
        replace(make_rollout("<answer>12</answer>", key=f"s{place}"), group_id=place, sample_index=index)
        for place in places
        for index in range(samples)
    ]


def lines(failures: dict[int, FailedReward]) -> Lines:
    """Two responses to each of the prompts 1, 2 and 3."""
    given = rollouts([1, 2, 3], 2)
    totals = torch.arange(6.0, dtype=torch.float64)
    rewards = Rewards(parts={"accuracy": totals}, weights={}, total=totals, failures=failures)
    return lines_of(given, rewards, make_env({"accuracy": 1.0}), "thinking_answer")


def test_a_prompt_is_counted_with_all_its_responses_or_not_at_all() -> None:
    found = lines({1: PART, 4: REFERENCE, 5: REFERENCE})
    assert [(line["key"], line["sample_index"], line["reward"]) for line in found.answered[2]] == [
        ("s2", 0, 2.0),
        ("s2", 1, 3.0),
    ]
    assert found.answered.keys() == {2}
    task: dict[str, Any] = {"task": "math"}
    assert found.unusable == {
        1: {**task, "key": "s1", "reason": "reward", "message": PART.message, "failed_responses": 1},
        3: {**task, "key": "s3", "reason": "reference", "message": REFERENCE.message},
    }
    assert found.failures == (PART,), "a fault of a sample is none of a reward"


def test_shares_of_ranks_are_joined_in_the_order_of_the_batch() -> None:
    whole = lines({1: PART})
    shares = [Lines({place: whole.answered[place]}, {}) for place in (3, 2)] + [Lines({}, whole.unusable, (PART,))]
    joined = Lines.joined(shares)
    assert joined == whole
    assert [*joined.answered] == [2, 3]


def test_an_evaluation_with_too_few_rewards_names_the_first_and_the_way_on() -> None:
    message = too_many([PART], 4, 40, 0.1)
    assert message.startswith("5 of 40 rewards, more than env.max_failed_rewards (0.1) allows,")
    assert PART.message in message
    assert message.endswith("give the command again")
