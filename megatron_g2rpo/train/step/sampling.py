# SPDX-License-Identifier: Apache-2.0
"""A step's rollouts: prompts drawn, answered and scored; groups without signal replaced.

With ``grpo.dynamic_sampling``, a round keeps the groups that have signal, and the next round draws prompts for those
that are missing. Every decision is about the global batch, in the order of the stream: which groups a step trains on
does not depend on the number of ranks, and a resumed run draws what the whole run would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import GroupStatistics, sharded_statistics
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.recipe.grpo_section import Grpo
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.step.advantages import tie_tolerance, with_reward
from megatron_g2rpo.train.step.generation import generate
from megatron_g2rpo.train.step.generation_work import StepWork
from megatron_g2rpo.train.step.minibatches import owned_prompts
from megatron_g2rpo.train.step.prompts import draw
from megatron_g2rpo.train.step.rewards import FailedRewards, scored, scoring_of
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.types import Rewards, Rollout, task_ids_of


@dataclass(frozen=True)
class Collected:
    """This data-parallel rank's part of a step's batch.

    Attributes:
        rollouts: this rank's rollouts, with ``group_id`` from 0 to ``num_prompts_per_step`` - 1 over all ranks.
        rewards: the rewards of these rollouts.
        failed: the rewards of all ranks that could not be computed, those of dropped groups included.
        metrics: ``train/sampling/...`` with dynamic sampling, ``work/rollout_...`` where the engine counts its work.
    """

    rollouts: list[Rollout]
    rewards: Rewards
    failed: FailedRewards
    metrics: dict[str, float]


def collect(recipe: TrainRecipe, components: Components, step: int, timers: Timers) -> Collected:
    """Sample and score the step's batch with the policy's current weights. A collective of all ranks.

    Args:
        recipe: the run's recipe.
        components: what the loop works with; prompts are drawn from its stream.
        step: number of the step, from 1; it seeds the draws.
        timers: the step's stopwatch.

    Raises:
        EngineUnavailable: the engine was lost, see ``answers``.
        SamplingStopped: the run was asked to stop, see ``answers``.
        RewardError: too many rewards could not be computed, or the data is wrong; see ``Scoring.rewards``.
    """
    with timers("generation"):
        components.engine.load_weights(components.policy.source())
    work = StepWork()
    collected = _collected(recipe, components, step, timers, work)
    components.engine.release()
    return replace(collected, metrics=collected.metrics | work.metrics())


def _collected(recipe: TrainRecipe, components: Components, step: int, timers: Timers, work: StepWork) -> Collected:
    size, options = recipe.grpo.num_prompts_per_step, recipe.grpo.dynamic_sampling
    if not options.enabled:
        rollouts, rewards, failed = _round(recipe, components, step, timers, work, 0, size, 0, FailedRewards())
        return Collected(rollouts, rewards, failed, {})

    everything: list[tuple[list[Rollout], Rewards]] = []
    kept: list[int] = []  # group ids of all ranks, in the order of the stream
    dropped: list[int] = []
    drawn = rounds = 0
    failed = FailedRewards()
    while len(kept) < size and rounds < options.max_rounds:
        asked = math.ceil((size - len(kept)) * options.oversampling)
        rollouts, rewards, failed = _round(recipe, components, step, timers, work, rounds, asked, drawn, failed)
        everything.append((rollouts, rewards))
        with timers("rewards"):
            signal = _with_signal(recipe.grpo, rollouts, rewards, components.policy.groups.data)
        for group in range(drawn, drawn + asked):
            (kept if group in signal else dropped).append(group)
        drawn += asked
        rounds += 1
    chosen = kept[:size]
    unfilled = size - len(chosen)
    chosen = sorted(chosen + dropped[:unfilled])
    metrics = {
        "rounds": rounds,
        "groups_drawn": drawn,
        "groups_dropped": len(dropped),
        "groups_surplus": max(len(kept) - size, 0),
        "groups_unfilled": unfilled,
    }
    rollouts, rewards = _select(everything, chosen)
    named = {f"train/sampling/{name}": float(value) for name, value in metrics.items()}
    return Collected(rollouts, rewards, failed, named)


def sampling_seed(seed: int, step: int, round_: int = 0) -> int:
    """Seed of the draws of one round of a step; the engine tells prompts and samples apart itself."""
    return seed * 1_000_003 + step + (round_ << 40)


def _round(
    recipe: TrainRecipe,
    components: Components,
    step: int,
    timers: Timers,
    work: StepWork,
    round_: int,
    size: int,
    first_group: int,
    failed: FailedRewards,
) -> tuple[list[Rollout], Rewards, FailedRewards]:
    """Answer the next ``size`` prompts of the stream; this rank's rollouts, with groups from ``first_group``.

    Args:
        recipe, components, step, timers: see ``collect``.
        work: of the step; what the engine did in this round is added.
        round_: number of the round in the step, from 0.
        size: number of prompts, over all ranks.
        first_group: group id of the first prompt.
        failed: the rewards of the step that could not be computed in earlier rounds; those of this one are added.
    """
    groups = components.policy.groups
    owned = owned_prompts(size, groups.data_rank, groups.data_size)
    with timers("data"):
        prompts = draw(components.stream, size, owned, groups)
    penalty = recipe.grpo.overlong_penalty.weight if recipe.grpo.overlong == "penalise" else None
    scoring = scoring_of(recipe, components.workers, overlong_weight=penalty)
    with timers("generation"):
        rollouts = generate(
            components.engine,
            components.policy,
            prompts,
            recipe.grpo.num_generations_per_prompt,
            sampling=Sampling.of_training(recipe.policy.generation),
            seed=sampling_seed(recipe.grpo.seed, step, round_),
            group_ids=[first_group + number for number in owned],
            # Workers score what is there already while the rest is sampled.
            on_finished=None if components.workers is None else scoring.add,
            stopping=components.stopping,
        )
    work.add(components.engine)
    with timers("rewards"):
        limit = recipe.env.max_failed_rewards
        rewards, failed_now = scored(
            scoring,
            rollouts,
            replica=groups.model,
            between=groups.data,
            most_failures=failed.most(limit, size * recipe.grpo.num_generations_per_prompt),
        )
        failed += failed_now
        failed.check(limit)
    return rollouts, rewards, failed


def _with_signal(
    grpo: Grpo, rollouts: Sequence[Rollout], rewards: Rewards, process_group: dist.ProcessGroup
) -> set[int]:
    """Groups, of all ranks, whose rewards differ and whose mean accuracy lies between the bounds.

    A group that is left with too few rewards, because the others could not be computed, is none of them.
    """
    rows = with_reward(grpo.adv_estimator, rollouts, rewards)
    rollouts, rewards = [rollouts[index] for index in rows.tolist()], rewards[rows]
    options, tolerance = grpo.dynamic_sampling, tie_tolerance(grpo.adv_estimator)
    total = _statistics(rollouts, rewards.total, tolerance, process_group).groups
    signal = ~total.zero_variance
    if options.filter_low is None and options.filter_high is None:
        return set(total.id[signal].tolist())
    accuracy = _statistics(rollouts, rewards.parts["accuracy"], tolerance, process_group).groups
    if options.filter_low is not None:
        signal &= accuracy.mean > options.filter_low
    if options.filter_high is not None:
        signal &= accuracy.mean < options.filter_high
    return set(total.id[signal].tolist())


def _statistics(
    rollouts: Sequence[Rollout], values: Tensor, tolerance: float, process_group: dist.ProcessGroup
) -> GroupStatistics:
    return sharded_statistics(
        values,
        torch.tensor([rollout.group_id for rollout in rollouts], dtype=torch.int64),
        task_ids_of(rollouts),
        process_group=process_group,
        tie_tolerance=tolerance,
    )


def _select(rounds: Sequence[tuple[list[Rollout], Rewards]], chosen: Sequence[int]) -> tuple[list[Rollout], Rewards]:
    """This rank's rollouts of the chosen groups, which are numbered anew, and their rewards."""
    number = {group: index for index, group in enumerate(chosen)}
    rollouts: list[Rollout] = []
    rewards: list[Rewards] = []
    for mine, their_rewards in rounds:
        places = [place for place, rollout in enumerate(mine) if rollout.group_id in number]
        rollouts += [replace(mine[place], group_id=number[mine[place].group_id]) for place in places]
        rewards.append(their_rewards[torch.tensor(places, dtype=torch.int64)])
    return rollouts, Rewards.concatenate(rewards)
