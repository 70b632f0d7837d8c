# SPDX-License-Identifier: Apache-2.0
"""One of two ranks of the rewards test: what each layout of two says, and what one process says of all rollouts."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.collectives import is_on_all_ranks
from megatron_g2rpo.extend import reward_part
from megatron_g2rpo.objective import History
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.recipe.grpo_section import AdvEstimator
from megatron_g2rpo.tasks.scoring import RewardError, Scoring
from megatron_g2rpo.train.step.advantages import advantages_of
from megatron_g2rpo.train.step.rewards import scored
from megatron_g2rpo.types import ModelInputs, Prompt, Rewards, Rollout, Sample
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.recipes import G2RPO
from tests.unit.tasks.common import make_env, make_task

GROUPS, SAMPLES = 6, 4
# (group, sample) of the responses that have no reward: of group 4 one reward is left, of group 5 none.
FAILING = {(0, 1), (3, 2), *((4, sample) for sample in range(3)), *((5, sample) for sample in range(4))}
calls = 0


@reward_part("flaky")
def flaky(sample: Any, response: Any) -> float:
    """A number that tells responses and processes apart only in ``pid``; nothing for those of ``FAILING``."""
    global calls
    calls += 1
    if (int(sample.key), response.sample_index) in FAILING:
        raise OSError("no connection")
    return (7 * int(sample.key) + 3 * response.sample_index) % 5 / 4


@reward_part("pid")
def pid(sample: Any, response: Any) -> float:
    """Which process was asked."""
    return float(os.getpid())


def rollouts(groups: range) -> list[Rollout]:
    nothing = ModelInputs(
        token_ids=torch.arange(2), pixel_values=torch.zeros(0, 6), image_grid_thw=torch.zeros(0, 3, dtype=torch.int64)
    )
    prompts = {
        group: Prompt(
            sample=Sample(key=str(group), task="ab"[group % 2], question="", answer="", answer_format="exact"),
            inputs=nothing,
            task_id=group % 2,
        )
        for group in groups
    }
    return [
        Rollout(
            prompt=prompts[group],
            group_id=group,
            sample_index=sample,
            response_ids=torch.zeros(1, dtype=torch.int64),
            logprobs=torch.zeros(1),
            text="",
            truncated=False,
        )
        for group in groups
        for sample in range(SAMPLES)
    ]


def scoring(**weights: float) -> Scoring:
    env = make_env(weights, a=make_task(), b=make_task())
    return Scoring(env, response_format="plain", max_response_tokens=9)


def advantages(mine: list[Rollout], rewards: Rewards, section: AdvEstimator, group: Any) -> list[float]:
    return advantages_of(section, mine, rewards, history=History(), process_group=group).values.tolist()


def main() -> None:
    init_process_group(this_device())
    rank, world = dist.get_rank(), dist.group.WORLD
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    section = recipes.load(G2RPO, [], "train").grpo.adv_estimator

    # One process with all rollouts.
    everything = rollouts(range(GROUPS))
    rewards, failed = scored(scoring(flaky=1.0), everything, replica=None, between=alone)
    whole = {"failed": sorted(f.message for f in failed.failures), "scored": failed.scored}
    values = advantages(everything, rewards, section, alone)

    # Data parallel 2: every rank has every other group.
    mine = rollouts(range(rank, GROUPS, 2))
    rewards, failed = scored(scoring(flaky=1.0), mine, replica=alone, between=world)
    spread = {"failed": sorted(f.message for f in failed.failures), "scored": failed.scored}
    places = [rollout.group_id * SAMPLES + rollout.sample_index for rollout in mine]
    same = advantages(mine, rewards, section, world) == [values[place] for place in places]

    # Two ranks of one replica: the first is asked, both have what it said.
    global calls
    calls = 0
    rewards, _ = scored(scoring(pid=1.0, flaky=1.0), everything, replica=world, between=alone)
    replica = {"pid": rewards.parts["pid"].nan_to_num(-1.0).tolist(), "failed": rewards.failed.tolist(), "calls": calls}

    # What one rank cannot go on with ends both.
    try:
        scored(scoring(flaky=1.0), mine, replica=alone, between=world, most_failures=4)
        error, known = "", False
    except RewardError as raised:
        error, known = str(raised), is_on_all_ranks(raised)
    try:
        failed.check(0.0)
        known = False
    except RewardError as raised:
        known = known and is_on_all_ranks(raised)
    report_result(
        {
            "whole": whole,
            "spread": spread,
            "same": same,
            "replica": replica,
            "error": error,
            "known": known and not is_on_all_ranks(RewardError("of a rank alone")),
            "pid": os.getpid(),
        }
    )


if __name__ == "__main__":
    main()
