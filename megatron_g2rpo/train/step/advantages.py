# SPDX-License-Identifier: Apache-2.0
"""From this rank's rewards to its advantages within the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.objective import (
    AdvantageDiagnostics,
    Estimator,
    GroupStatistics,
    History,
    RewardBatch,
    advantage_diagnostics,
    estimators,
    sharded_advantages,
)
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


def estimator_of(recipe: TrainRecipe, part_weights: dict[str, float] | None = None) -> Estimator:
    """The estimator that ``grpo.adv_estimator`` names, with those of the section's options that it has.

    Args:
        part_weights: of the reward's parts, for estimators that look at them one by one.

    Raises:
        ValueError: unknown name.
    """
    options = recipe.grpo.adv_estimator.model_dump()
    options["part_weights"] = part_weights or {}
    name = options.pop("name")
    return estimators.bind(name, **{key: options[key] for key in estimators.options(name) if key in options})


def advantages_of(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], rewards: Rewards) -> Advantages:
    """Advantages of this data-parallel rank's rollouts. A collective over the data-parallel group; once a step."""
    options = recipe.grpo.adv_estimator
    estimate = estimator_of(recipe, dict(rewards.weights))
    everywhere: list[AdvantageDiagnostics] = []

    def watched(rows: RewardBatch, history: History) -> Tensor:
        advantages = estimate(rows, history)
        everywhere.append(advantage_diagnostics(advantages, rows.tasks))
        return advantages

    values, statistics = sharded_advantages(
        rewards.total,
        torch.tensor([rollout.group_id for rollout in rollouts], dtype=torch.int64),
        torch.tensor([parts.task_id(rollout.prompt.task) for rollout in rollouts], dtype=torch.int64),
        estimator=watched,
        group=parts.policy.groups.data,
        history=parts.history,
        parts=rewards.parts if estimators.uses_parts(options.name) else None,
        tie_tolerance=options.tie_tolerance,
    )
    return Advantages(values=values, diagnostics=everywhere[0], statistics=statistics)
