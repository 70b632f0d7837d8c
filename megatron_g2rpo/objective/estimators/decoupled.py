# SPDX-License-Identifier: Apache-2.0
"""Estimators that normalise every part of the reward on its own, and then the weighted sum of the results.

A part that would be too small to matter in the sum of the raw rewards, or whose combinations with other parts would
tie, keeps its signal. A part of weight 0 is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, gaussian_advantages
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import standardised, statistics_by
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch, first_non_finite


@register("gdpo", uses_parts=True, min_group_size=2)
def gdpo(
    batch: RewardBatch,
    history: History,
    *,
    tie_tolerance: Annotated[float, Ge(0.0)] = TIE_TOLERANCE,
) -> Tensor:
    """Standardise each reward part within each group, sum with weights, and standardise over the whole batch.

    Source: "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", arXiv
    2601.05242. Population standard deviations, with nothing added to the denominators.

    Args:
        tie_tolerance: a group whose values of a part, or a batch whose sums, are all equal within this tolerance
            gets 0.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: the batch has no parts, the weights name other parts, or a value is not finite.
    """
    total = torch.zeros(len(batch), dtype=torch.float64)
    for weight, part in _weighted_parts(batch):
        total = total + weight * standardised(part, batch.group_ids, tie_tolerance)
    return standardised(total, torch.zeros_like(batch.group_ids), tie_tolerance)


@register("g2_gdpo", uses_parts=True, min_group_size=2)
def g2_gdpo(
    batch: RewardBatch,
    history: History,
    *,
    tie_tolerance: Annotated[float, Ge(0.0)] = TIE_TOLERANCE,
    zero_variance: Literal["drop", "keep"] = "drop",
    variance: Literal["as_is", "unit"] = "as_is",
) -> Tensor:
    """Map each reward part to N(0, 1) within each group, sum with weights, and map to N(0, 1) within each task.

    Source: the public code of "OpenVLThinkerV2", arXiv 2604.08539 (Gaussian GDPO). A part whose values are all
    equal within a group adds 0 there.

    Args:
        tie_tolerance: as in ``gaussian_advantages``, in both stages.
        zero_variance: what becomes of a group in which every part is all-equal. ``"drop"``: its rollouts get 0 and
            take no rank in their task. ``"keep"``: they enter the task stage at 0.
        variance: as in ``gaussian_advantages``.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: an option is unknown, the batch has no parts, the weights name other parts, or a value is not
            finite.
    """
    total = torch.zeros(len(batch), dtype=torch.float64)
    ranked = torch.full((len(batch),), zero_variance != "drop")
    for weight, part in _weighted_parts(batch):
        sets, index = statistics_by(part, batch.group_ids, tie_tolerance)
        ranked |= ~sets.zero_variance[index] & (weight != 0.0)
        total = total + weight * gaussian_advantages(
            part, batch.group_ids, batch.task_ids, stages=("group",), tie_tolerance=tie_tolerance, zero_variance="keep"
        )
    advantages = torch.zeros(len(batch), dtype=torch.float64)
    advantages[ranked] = gaussian_advantages(
        total[ranked],
        batch.group_ids[ranked],
        batch.task_ids[ranked],
        stages=("task",),
        tie_tolerance=tie_tolerance,
        zero_variance=zero_variance,
        variance=variance,
    )
    return advantages


def _weighted_parts(batch: RewardBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (weights ``[N]``, part ``[N]``) for every part with a weight other than 0, in the order of the names."""
    if len(batch) == 0:
        return  # a batch without rollouts need not know its parts
    if not batch.parts:
        raise ValueError("this advantage estimator needs the parts of the rewards, and the batch has none")
    for name, part in batch.parts.items():
        weights = batch.part_weights[name]
        bad = first_non_finite(weights)
        if bad is not None:
            raise ValueError(f"part {name!r} has the weight {weights[bad].item()}; weights must be finite")
        if bool((weights != 0.0).any()):
            yield weights, part
