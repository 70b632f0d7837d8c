# SPDX-License-Identifier: Apache-2.0
"""Estimators that divide by the standard deviation of the whole batch."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import HUGE, scaled_difference, standardised, statistics_by
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("reinforce_plus_plus", min_group_size=lambda baseline, **_: 2 if baseline == "group" else 1)
def reinforce_plus_plus(
    batch: RewardBatch,
    history: History,
    *,
    baseline: Literal["group", "batch"] = "group",
    tie_tolerance: Annotated[float, Ge(0.0)] = TIE_TOLERANCE,
) -> Tensor:
    """Standardise rewards, or their differences from their group's mean, over the whole batch.

    Source: "REINFORCE++", arXiv 2501.03262. Its penalty on the distance to a reference policy belongs to the loss here.

    Args:
        baseline: ``"batch"``: ``(R - mean) / std`` over the batch. ``"group"`` (the paper's variant with a baseline):
            the differences ``R - mean of the group`` take the rewards' place, so that the standard deviation is theirs.
        tie_tolerance: a batch whose standardised quantities are all equal within this tolerance gets 0.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: the baseline is unknown, or a reward is not finite.
    """
    values = batch.rewards.double()
    if baseline == "group":
        sets, index = statistics_by(values, batch.group_ids, tie_tolerance)
        # Any common divisor leaves the result as it is; 4 keeps the differences of the largest doubles in range.
        divisor = 4.0 if bool((values.abs() > HUGE).any()) else 1.0
        values = scaled_difference(values, sets.mean[index], torch.full_like(values, divisor))
    elif baseline != "batch":
        raise ValueError(f"baseline must be 'batch' or 'group', got {baseline!r}")
    return standardised(values, torch.zeros_like(batch.group_ids), tie_tolerance)
