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
from torch import Tensor

from megatron_g2rpo.objective import GroupStatistics, sharded_statistics
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.tasks.scoring import score
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.step.advantages import tie_tolerance
from megatron_g2rpo.train.step.generation import generate
from megatron_g2rpo.train.step.minibatches import check_lengths, owned_prompts
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.types import Rewards, Rollout


@dataclass(frozen=True)
class Collected:
    """This data-parallel rank's part of a step's batch.

    Attributes:
        rollouts: with ``group_id`` from 0 to ``num_prompts_per_step`` - 1 over all ranks.
        rewards: of them.
        metrics: ``train/sampling/...``; empty without dynamic sampling.
    """

    rollouts: list[Rollout]
    rewards: Rewards
    metrics: dict[str, float]


def collect(recipe: TrainRecipe, parts: Components, step: int, timers: Timers) -> Collected:
    """Sample and score the step's batch with the policy's current weights. A collective of all ranks."""
    with timers("generation"):
        parts.engine.load_weights(parts.policy.source())
    collected = _collected(recipe, parts, step, timers)
    parts.engine.release()
    return collected


def _collected(recipe: TrainRecipe, parts: Components, step: int, timers: Timers) -> Collected:
    size, options = recipe.grpo.num_prompts_per_step, recipe.grpo.dynamic_sampling
    if not options.enabled:
        rollouts, rewards = _round(recipe, parts, step, timers, 0, size, 0)
        return Collected(rollouts, rewards, {})

    everything: list[tuple[list[Rollout], Rewards]] = []
    kept: list[int] = []  # group ids of all ranks, in the order of the stream
    dropped: list[int] = []
    drawn = rounds = 0
    while len(kept) < size and rounds < options.max_rounds:
        asked = math.ceil((size - len(kept)) * options.oversampling)
        rollouts, rewards = _round(recipe, parts, step, timers, rounds, asked, drawn)
        everything.append((rollouts, rewards))
        with timers("rewards"):
            signal = _with_signal(recipe, parts, rollouts, rewards)
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
    return Collected(rollouts, rewards, {f"train/sampling/{name}": float(value) for name, value in metrics.items()})


def sampling_seed(seed: int, step: int, round_: int = 0) -> int:
    """Seed of a round's draws; the engine tells prompts and samples apart itself."""
    return seed * 1_000_003 + step + (round_ << 40)


def _round(
    recipe: TrainRecipe, parts: Components, step: int, timers: Timers, round_: int, size: int, first_group: int
) -> tuple[list[Rollout], Rewards]:
    """Answer the next ``size`` prompts of the stream; this rank's rollouts, with groups from ``first_group``."""
    owned = owned_prompts(size, parts.policy.groups)
    with timers("data"):
        prompts = parts.stream.next_batch(size, owned)
        check_lengths(recipe, prompts)
    with timers("generation"):
        rollouts = generate(
            parts,
            prompts,
            recipe.grpo.num_generations_per_prompt,
            temperature=recipe.policy.generation.temperature,
            seed=sampling_seed(recipe.grpo.seed, step, round_),
            group_ids=[first_group + row for row in owned],
        )
    with timers("rewards"):
        return rollouts, _score(recipe, rollouts)


def _score(recipe: TrainRecipe, rollouts: Sequence[Rollout]) -> Rewards:
    penalty = recipe.grpo.overlong_penalty
    return score(
        rollouts,
        recipe.env,
        response_format=recipe.data.response_format,
        max_response_tokens=recipe.policy.generation.max_new_tokens,
        overlong_buffer=penalty.buffer,
        overlong_weight=penalty.weight if recipe.grpo.overlong == "penalise" else None,
    )


def _with_signal(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], rewards: Rewards) -> set[int]:
    """Groups, of all ranks, whose rewards differ and whose mean accuracy lies between the bounds."""
    options = recipe.grpo.dynamic_sampling
    total = _statistics(recipe, parts, rollouts, rewards.total).groups
    signal = ~total.zero_variance
    if options.filter_low is None and options.filter_high is None:
        return set(total.id[signal].tolist())
    accuracy = _statistics(recipe, parts, rollouts, rewards.parts["accuracy"]).groups
    if options.filter_low is not None:
        signal &= accuracy.mean > options.filter_low
    if options.filter_high is not None:
        signal &= accuracy.mean < options.filter_high
    return set(total.id[signal].tolist())


def _statistics(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], values: Tensor) -> GroupStatistics:
    return sharded_statistics(
        values,
        torch.tensor([rollout.group_id for rollout in rollouts], dtype=torch.int64),
        torch.tensor([parts.task_id(rollout.prompt.task) for rollout in rollouts], dtype=torch.int64),
        process_group=parts.policy.groups.data,
        tie_tolerance=tie_tolerance(recipe),
    )


def _select(rounds: Sequence[tuple[list[Rollout], Rewards]], chosen: Sequence[int]) -> tuple[list[Rollout], Rewards]:
    """This rank's rollouts of the chosen groups, which are numbered anew, and their rewards."""
    number = {group: index for index, group in enumerate(chosen)}
    rollouts: list[Rollout] = []
    rewards: list[Rewards] = []
    for mine, scored in rounds:
        rows = [row for row, rollout in enumerate(mine) if rollout.group_id in number]
        rollouts += [replace(mine[row], group_id=number[mine[row].group_id]) for row in rows]
        rewards.append(scored[torch.tensor(rows, dtype=torch.int64)])
    return rollouts, Rewards.concatenate(rewards)
