# SPDX-License-Identifier: Apache-2.0
"""Differences from the mean of a set, and their quotients, computed without overflow of intermediate results.

Means and standard deviations come from ``group_statistics``, whose sums do not depend on the order of the rollouts.
Everything here is elementwise on top of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, SetStatistics, group_statistics

HUGE = 2.0**1000  # differences of values below it are far from the largest double, 2**1024


def statistics_by(values: Tensor, ids: Tensor, tie_tolerance: float = TIE_TOLERANCE) -> tuple[SetStatistics, Tensor]:
    """Return statistics of float64 ``values [N]`` by int64 ``ids [N]``, and each value's index into them, ``[N]``."""
    sets = group_statistics(values, ids, ids, tie_tolerance=tie_tolerance).groups
    return sets, torch.searchsorted(sets.id, ids)


def scaled_difference(values: Tensor, means: Tensor, divisors: Tensor) -> Tensor:
    """Return ``(values - means) / divisors``, float64 ``[N]``, also where the difference alone would overflow."""
    huge = (values.abs() > HUGE) | (means.abs() > HUGE)
    scale = torch.where(huge, 0.25, 1.0).double()
    return (values * scale - means * scale) / (divisors * scale)


def standardised(values: Tensor, ids: Tensor, tie_tolerance: float) -> Tensor:
    """Return ``(value - mean) / population standard deviation`` within each set, float64 ``[N]``.

    Args:
        values: float64 ``[N]``, the values to standardise.
        ids: int64 ``[N]``, the set of each value.
        tie_tolerance: a set whose values are all equal within this tolerance gets exactly 0.
    """
    sets, index = statistics_by(values, ids, tie_tolerance)
    # Distinct denormals may have a standard deviation that rounds to 0.
    none = (sets.zero_variance | (sets.std == 0.0))[index]
    quotients = scaled_difference(values, sets.mean[index], torch.where(none, 1.0, sets.std[index]))
    return torch.where(none, 0.0, quotients)
