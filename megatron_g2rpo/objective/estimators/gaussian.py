# SPDX-License-Identifier: Apache-2.0
"""Estimators that map values to N(0, 1) by rank.

Source: "OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks", arXiv 2604.08539, and
its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len
from torch import Tensor

from megatron_g2rpo.objective.advantages import STAGES, TIE_TOLERANCE, check_options, gaussian_advantages
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


def _check(*, stages: Sequence[str], **options: Any) -> None:
    check_options(stages=stages, **options)
    if list(stages) == list(reversed(STAGES)):
        raise ValueError(f"stages must be [group], [task] or [group, task], got {list(stages)}")


@register("g2rpo", min_group_size=lambda stages, **_: 2 if "group" in stages else 1, check=_check)
def g2rpo(
    batch: RewardBatch,
    history: History,
    *,
    stages: Annotated[Sequence[Literal["group", "task"]], Len(min_length=1)] = STAGES,
    tie_tolerance: Annotated[float, Ge(0.0)] = TIE_TOLERANCE,
    zero_variance: Literal["drop", "keep"] = "drop",
    variance: Literal["as_is", "unit"] = "as_is",
) -> Tensor:
    """Compute Gaussian advantages of the rewards; options and exceptions are those of ``gaussian_advantages``.

    Returns:
        The advantages, float64 ``[N]``.
    """
    return gaussian_advantages(
        batch.rewards,
        batch.group_ids,
        batch.task_ids,
        stages=stages,
        tie_tolerance=tie_tolerance,
        zero_variance=zero_variance,
        variance=variance,
    )
