# SPDX-License-Identifier: Apache-2.0
"""From this rank's rewards to its advantages within the global batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import (
    AdvantageDiagnostics,
    GroupStatistics,
    History,
    advantage_diagnostics,
    estimators,
    sharded_advantages,
)
from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.recipe.grpo_section import AdvEstimator
from megatron_g2rpo.types import Rewards, Rollout, task_ids_of


@dataclass(frozen=True)
class Advantages:
    """Advantages of a step.

    Attributes:
        values: float64 ``[N]``, one for each of this data-parallel rank's rollouts; 0 for those that ``with_reward``
            leaves out.
        diagnostics: how the advantages of the global batch are distributed, by task.
        statistics: mean and spread of the rewards of the global batch, by group and by task.
    """

    values: Tensor
    diagnostics: AdvantageDiagnostics
    statistics: GroupStatistics


def with_reward(section: AdvEstimator, rollouts: Sequence[Rollout], rewards: Rewards) -> Tensor:
    """Rollouts that advantages are computed from: those with a reward, in groups that have enough of them.

    Args:
        section: the recipe's ``grpo.adv_estimator``, whose estimator needs groups of a certain size.
        rollouts: rollouts, whole groups of them.
        rewards: their rewards.

    Returns:
        int64 ``[M]``, their indices, ascending.
    """
    kept = [index for index, failed in enumerate(rewards.failed.tolist()) if not failed]
    sizes = Counter(rollouts[index].group_id for index in kept)
    return torch.tensor(
        [index for index in kept if sizes[rollouts[index].group_id] >= section.min_group_size], dtype=torch.int64
    )


def tie_tolerance(section: AdvEstimator) -> float:
    """Rewards closer than this are equal: the estimator's option of that name, or the objective's default."""
    return section.options.get("tie_tolerance", TIE_TOLERANCE)


def advantages_of(
    section: AdvEstimator,
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    *,
    history: History,
    process_group: dist.ProcessGroup,
) -> Advantages:
    """Advantages of this data-parallel rank's rollouts. A collective of the data-parallel ranks, once a step.

    They are those of a batch without the rollouts that have no reward.

    Args:
        section: the recipe's ``grpo.adv_estimator``.
        rollouts: this rank's rollouts of the step, whole groups of them.
        rewards: the rewards of these rollouts.
        history: what the estimator remembers of earlier steps; it is updated.
        process_group: the data-parallel ranks, over which the global batch is spread.
    """
    uses_parts = estimators.uses_parts(section.name)
    rows = with_reward(section, rollouts, rewards)
    kept, rewards = [rollouts[index] for index in rows.tolist()], rewards[rows]
    shared = sharded_advantages(
        rewards.total,
        torch.tensor([rollout.group_id for rollout in kept], dtype=torch.int64),
        task_ids_of(kept),
        estimator=section.bound(),
        process_group=process_group,
        history=history,
        parts=rewards.parts if uses_parts else None,
        part_weights=rewards.weights if uses_parts else None,
        tie_tolerance=tie_tolerance(section),
    )
    values = torch.zeros(len(rollouts), dtype=torch.float64)
    values[rows] = shared.advantages
    return Advantages(
        values=values,
        diagnostics=advantage_diagnostics(shared.global_advantages, shared.global_task_ids),
        statistics=shared.statistics,
    )
