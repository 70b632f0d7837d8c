# SPDX-License-Identifier: Apache-2.0
"""Estimators that compare a reward with those of its own group, and with nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import standardised, statistics_by
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("grpo")
def grpo(rows: RewardBatch, history: History, *, tie_tolerance: float = TIE_TOLERANCE) -> Tensor:
    """Group-relative advantages, ``(R - mean) / population standard deviation`` within each group.

    Source: "DeepSeekMath", arXiv 2402.03300, equation of section 4.1.2. The population standard deviation, with nothing
    added to the denominator, is what the figure of arXiv 2604.08539 shows.

    Args:
        tie_tolerance: a group whose rewards are all equal within it gets 0.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: a reward that is not finite.
    """
    return standardised(rows.rewards.double(), rows.groups, tie_tolerance)


@register("dr_grpo")
def dr_grpo(rows: RewardBatch, history: History) -> Tensor:
    """Rewards less their group's mean, divided by nothing.

    Source: "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783 (Dr. GRPO).

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: a reward that is not finite.
    """
    values = rows.rewards.double()
    sets, index = statistics_by(values, rows.groups)
    return values - sets.mean[index]


@register("rloo")
def rloo(rows: RewardBatch, history: History) -> Tensor:
    """Rewards less the mean of the other rewards of their group: REINFORCE with a leave-one-out baseline.

    Of n rewards, ``R - (sum - R) / (n - 1)`` is ``(R - mean) n / (n - 1)``. A group of one has no others and gets 0.

    Source: "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs", arXiv
    2402.14740.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: a reward that is not finite.
    """
    values = rows.rewards.double()
    sets, index = statistics_by(values, rows.groups)
    count = sets.count[index].double()
    return (values - sets.mean[index]) * (count / torch.clamp(count - 1.0, min=1.0))
