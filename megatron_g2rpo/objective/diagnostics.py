# SPDX-License-Identifier: Apache-2.0
"""Metrics of how the advantages of every task are distributed, and how far from N(0, 1); they carry no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.objective.advantages import group_statistics

_QUANTILES = torch.tensor([0.05, 0.50, 0.95], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class AdvantageDiagnostics:
    """The distribution of the advantages of T tasks, one entry per task, ids ascending.

    Attributes:
        task: int64 ``[T]``, ids of the tasks.
        mean: float64 ``[T]``, mean advantage.
        std: float64 ``[T]``, population standard deviation of the advantages.
        skew: float64 ``[T]``, mean of the third power of ``(A - mean) / std``; 0 where ``std`` is 0.
        q05: float64 ``[T]``, the 5% quantile, interpolated linearly between neighbours.
        q50: float64 ``[T]``, the median.
        q95: float64 ``[T]``, the 95% quantile.
        normal_distance: float64 ``[T]``, 1-Wasserstein distance to N(0, 1), see ``normal_distance``.
    """

    task: Tensor
    mean: Tensor
    std: Tensor
    skew: Tensor
    q05: Tensor
    q50: Tensor
    q95: Tensor
    normal_distance: Tensor


def advantage_diagnostics(advantages: Tensor, tasks: Tensor) -> AdvantageDiagnostics:
    """Describe the advantages of every task; the result does not depend on the order of the rollouts, bit for bit.

    Args:
        advantages: float32 or float64 ``[N]`` on the CPU; computed in float64.
        tasks: int64 ``[N]``, task ids.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: lengths differ, or an advantage is not finite.
    """
    statistics = group_statistics(advantages, tasks, tasks).tasks
    values = advantages.double() + 0.0  # -0 becomes +0: a sort would leave their order to the caller
    columns = []
    for task, mean, std in zip(statistics.id.tolist(), statistics.mean.tolist(), statistics.std.tolist(), strict=True):
        ordered = values[tasks == task].sort().values
        skew = ((ordered - mean) / std).pow(3).mean().item() if std > 0.0 else 0.0
        columns.append([skew, *torch.quantile(ordered, _QUANTILES).tolist(), normal_distance(ordered)])
    skew, q05, q50, q95, distance = torch.tensor(columns, dtype=torch.float64).reshape(-1, 5).T.contiguous()
    return AdvantageDiagnostics(
        task=statistics.id,
        mean=statistics.mean,
        std=statistics.std,
        skew=skew,
        q05=q05,
        q50=q50,
        q95=q95,
        normal_distance=distance,
    )


def normal_distance(values: Tensor) -> float:
    """Return the exact 1-Wasserstein distance between the empirical distribution of ``values`` and N(0, 1).

    The distance is the integral over u in (0, 1) of ``|x(u) - Phi^-1(u)|``, where the empirical quantile function x(u)
    is the k-th smallest value on ((k - 1) / n, k / n). On such a step [a, b] the sign changes at c, which is Phi(x)
    brought into [a, b]; the integral of Phi^-1 over an interval is the difference of the normal density at the
    quantiles of its ends, so that the step adds ``x (2 c - a - b) + 2 phi(c) - phi(a) - phi(b)``.

    Args:
        values: float64 ``[n]``, n at least 1.
    """
    ordered = values.sort().values
    n = len(ordered)
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    quantiles = torch.special.ndtri(edges)  # -inf at 0 and inf at 1, where the density is 0
    crossing = torch.special.ndtr(ordered).clamp(edges[:-1], edges[1:])
    density = _density(quantiles)
    at_crossing = _density(ordered.clamp(quantiles[:-1], quantiles[1:]))
    steps = ordered * (2.0 * crossing - edges[:-1] - edges[1:]) + 2.0 * at_crossing - density[:-1] - density[1:]
    return steps.clamp(min=0.0).sum().item()


def _density(values: Tensor) -> Tensor:
    return torch.exp(-0.5 * values.square()) / math.sqrt(2.0 * math.pi)
