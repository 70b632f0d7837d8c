# SPDX-License-Identifier: Apache-2.0
"""From this rank's rewards to its advantages within the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.objective import (
    AdvantageDiagnostics,
    GroupStatistics,
    advantage_diagnostics,
    estimators,
    sharded_advantages,
)
from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.types import Rewards, Rollout


@dataclass(frozen=True)
class Advantages:
    """Advantages of a step.

    Attributes:
        values: float64 ``[N]``, of this data-parallel rank's rollouts.
        diagnostics: how those of the global batch are distributed, by task.
        statistics: of the rewards of the global batch.
    """

    values: Tensor
    diagnostics: AdvantageDiagnostics
    statistics: GroupStatistics


def tie_tolerance(recipe: TrainRecipe) -> float:
    """Rewards closer than this are equal: what the estimator says of it, if it does."""
    return recipe.grpo.adv_estimator.options.get("tie_tolerance", TIE_TOLERANCE)


def advantages_of(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], rewards: Rewards) -> Advantages:
    """Advantages of this data-parallel rank's rollouts. A collective over the data-parallel group; once a step."""
    section = recipe.grpo.adv_estimator
    uses_parts = estimators.uses_parts(section.name)
    shared = sharded_advantages(
        rewards.total,
        torch.tensor([rollout.group_id for rollout in rollouts], dtype=torch.int64),
        torch.tensor([parts.task_id(rollout.prompt.task) for rollout in rollouts], dtype=torch.int64),
        estimator=section.bound(),
        process_group=parts.policy.groups.data,
        history=parts.history,
        parts=rewards.parts if uses_parts else None,
        part_weights=rewards.weights if uses_parts else None,
        tie_tolerance=tie_tolerance(recipe),
    )
    return Advantages(
        values=shared.advantages,
        diagnostics=advantage_diagnostics(shared.global_advantages, shared.global_task_ids),
        statistics=shared.statistics,
    )
