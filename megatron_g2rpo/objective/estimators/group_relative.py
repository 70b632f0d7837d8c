# SPDX-License-Identifier: Apache-2.0
"""Estimators that compare a reward with those of its own group, and with nothing else."""

from __future__ import annotations

from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import standardised
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.rows import Rows


@register("grpo")
def grpo(rows: Rows, history: History, *, tie_tolerance: float = TIE_TOLERANCE) -> Tensor:
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
