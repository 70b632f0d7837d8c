# SPDX-License-Identifier: Apache-2.0
"""Estimators that compare a reward only with those of its own group."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import standardised, statistics_by
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("grpo", min_group_size=2)
def grpo(batch: RewardBatch, history: History, *, tie_tolerance: Annotated[float, Ge(0.0)] = TIE_TOLERANCE) -> Tensor:
    """Compute group-relative advantages, ``(R - mean) / population standard deviation`` within each group.

    Source: "DeepSeekMath", arXiv 2402.03300, equation of section 4.1.2. The population standard deviation, with nothing
    added to the denominator, is what the figure of arXiv 2604.08539 shows.

    Args:
        tie_tolerance: a group whose rewards are all equal within this tolerance gets 0.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: a reward is not finite.
    """
    return standardised(batch.rewards.double(), batch.group_ids, tie_tolerance)


@register("dr_grpo", min_group_size=2)
def dr_grpo(batch: RewardBatch, history: History) -> Tensor:
    """Subtract from each reward the mean of its group, without dividing by a standard deviation.

    Source: "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783 (Dr. GRPO).

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: a reward is not finite.
    """
    values = batch.rewards.double()
    sets, index = statistics_by(values, batch.group_ids)
    return values - sets.mean[index]


@register("rloo", min_group_size=2)
def rloo(batch: RewardBatch, history: History) -> Tensor:
    """Subtract from each reward the mean of the other rewards of its group (leave-one-out baseline, RLOO).

    Of n rewards, ``R - (sum - R) / (n - 1)`` is ``(R - mean) n / (n - 1)``. A group of one has no others and gets 0.

    Source: "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs", arXiv
    2402.14740.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: a reward is not finite.
    """
    values = batch.rewards.double()
    sets, index = statistics_by(values, batch.group_ids)
    count = sets.count[index].double()
    return (values - sets.mean[index]) * (count / torch.clamp(count - 1.0, min=1.0))
