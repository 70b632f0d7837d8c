# SPDX-License-Identifier: Apache-2.0
"""Estimators that map values to N(0, 1) by rank.

Source: "OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks", arXiv 2604.08539, and
its public code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_g2rpo.objective.advantages import STAGES, TIE_TOLERANCE, gaussian_advantages
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("g2rpo")
def g2rpo(
    rows: RewardBatch,
    history: History,
    *,
    stages: Sequence[str] = STAGES,
    tie_tolerance: float = TIE_TOLERANCE,
    zero_variance: str = "drop",
    variance: str = "as_is",
) -> Tensor:
    """Gaussian advantages of the rewards; see ``gaussian_advantages`` for the options and what raises.

    Returns:
        float64 ``[N]``.
    """
    return gaussian_advantages(
        rows.rewards,
        rows.groups,
        rows.tasks,
        stages=stages,
        tie_tolerance=tie_tolerance,
        zero_variance=zero_variance,
        variance=variance,
    )
