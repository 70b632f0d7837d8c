# SPDX-License-Identifier: Apache-2.0
"""From this rank's rewards to its advantages within the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_g2rpo.nouns import Rewards, Rollout
from megatron_g2rpo.objective import Estimator, GroupStatistics, estimators, sharded_advantages
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.assembly import Assembly


def estimator_of(recipe: TrainRecipe) -> Estimator:
    """The estimator that ``grpo.adv_estimator`` names, with those of the section's options that it has.

    Raises:
        ValueError: unknown name.
    """
    options = recipe.grpo.adv_estimator.model_dump()
    name = options.pop("name")
    return estimators.bind(name, **{key: options[key] for key in estimators.options(name) if key in options})


def advantages_of(
    recipe: TrainRecipe, parts: Assembly, rollouts: Sequence[Rollout], rewards: Rewards
) -> tuple[Tensor, GroupStatistics]:
    """Advantages of this data-parallel rank's rollouts. A collective over the data-parallel group.

    Returns:
        float64 ``[N]`` in the order of the rollouts, and the statistics of the global batch.
    """
    return sharded_advantages(
        rewards.total,
        torch.tensor([rollout.group_id for rollout in rollouts], dtype=torch.int64),
        torch.tensor([parts.task_id(rollout.prompt.task) for rollout in rollouts], dtype=torch.int64),
        estimator=estimator_of(recipe),
        group=parts.policy.groups.data,
        tie_tolerance=recipe.grpo.adv_estimator.tie_tolerance,
    )
