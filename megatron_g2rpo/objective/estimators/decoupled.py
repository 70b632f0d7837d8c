# SPDX-License-Identifier: Apache-2.0
"""Estimators that normalise every component of the reward on its own, and then their weighted sum.

A component that would drown in the sum of the raw rewards, or tie with another combination of components, keeps its
signal. ``part_weights`` names every component of the rows; one of weight 0 takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, gaussian_advantages
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import standardised, statistics_by
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("gdpo")
def gdpo(
    rows: RewardBatch,
    history: History,
    *,
    part_weights: Mapping[str, float] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Tensor:
    """Components standardised within each group, summed with weights, and standardised over the whole batch.

    Source: "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", arXiv
    2601.05242. Population standard deviations, with nothing added to the denominators.

    Args:
        part_weights: weight of every component; None: 1 each.
        tie_tolerance: a group whose values of a component, or a batch whose sums, are all equal within it gets 0.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: no components, weights of other components, or a value that is not finite.
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    for weight, part in _weighted_parts(rows, part_weights):
        total = total + weight * standardised(part, rows.groups, tie_tolerance)
    return standardised(total, torch.zeros_like(rows.groups), tie_tolerance)


@register("g2_gdpo")
def g2_gdpo(
    rows: RewardBatch,
    history: History,
    *,
    part_weights: Mapping[str, float] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
    zero_variance: str = "drop",
    variance: str = "as_is",
) -> Tensor:
    """Components mapped to N(0, 1) within each group, summed with weights, and mapped to N(0, 1) within each task.

    Source: the public code of "OpenVLThinkerV2", arXiv 2604.08539 (Gaussian GDPO). A component whose values are all
    equal within a group adds 0 there.

    Args:
        part_weights: weight of every component; None: 1 each.
        tie_tolerance: as in ``gaussian_advantages``, in both stages.
        zero_variance: what becomes of a group in which every component is all-equal. ``"drop"``: its rows get 0 and
            take no rank in their task. ``"keep"``: they enter the task stage at 0.
        variance: as in ``gaussian_advantages``.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: an unknown option, no components, weights of other components, or a value that is not finite.
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    ranked = torch.full((len(rows),), zero_variance != "drop")
    for weight, part in _weighted_parts(rows, part_weights):
        sets, index = statistics_by(part, rows.groups, tie_tolerance)
        ranked |= ~sets.zero_variance[index]
        total = total + weight * gaussian_advantages(
            part, rows.groups, rows.tasks, stages=("group",), tie_tolerance=tie_tolerance, zero_variance="keep"
        )
    advantages = torch.zeros(len(rows), dtype=torch.float64)
    advantages[ranked] = gaussian_advantages(
        total[ranked],
        rows.groups[ranked],
        rows.tasks[ranked],
        stages=("task",),
        tie_tolerance=tie_tolerance,
        zero_variance=zero_variance,
        variance=variance,
    )
    return advantages


def _weighted_parts(rows: RewardBatch, part_weights: Mapping[str, float] | None) -> Iterator[tuple[float, Tensor]]:
    """Yields (weight, component) for every weight that is not 0, always in the order of the names."""
    if len(rows) == 0:
        return  # a batch without rows need not know its components
    if not rows.parts:
        raise ValueError("this advantage estimator needs the components of the rewards, and the rows have none")
    weights = dict.fromkeys(rows.parts, 1.0) if part_weights is None else part_weights
    if set(weights) != set(rows.parts):
        raise ValueError(
            f"part_weights must name every component of the reward and no other: it names "
            f"{', '.join(sorted(weights)) or 'none'}, the components are {', '.join(sorted(rows.parts))}"
        )
    for name in sorted(rows.parts):
        if not math.isfinite(weights[name]):
            raise ValueError(f"part_weights gives {name!r} the weight {weights[name]}; weights must be finite")
        if weights[name] != 0.0:
            yield weights[name], rows.parts[name]
