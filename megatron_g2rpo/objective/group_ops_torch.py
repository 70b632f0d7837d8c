# SPDX-License-Identifier: Apache-2.0
"""The compiled op in torch: the reference for the C++ op in tests, and its replacement where it is not built.

It loops over the sets in Python, so that it can be read beside the formula. Sums run over sorted values, as in C++, so
that results do not depend on the order of the rollouts. The quantile function is torch's, independent of the C++ one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_g2rpo.objective.reward_batch import RewardBatch, first_non_finite, non_finite_message


def gaussian_advantages(
    batch: RewardBatch, *, stages: Sequence[str], tie_tolerance: float, drop_zero_variance: bool, unit_variance: bool
) -> Tensor:
    """Compute what ``megatron_g2rpo.objective.gaussian_advantages`` documents."""
    values = _finite_values(batch)
    active = torch.ones(len(batch), dtype=torch.bool)
    for stage in stages:
        for _, members in _sets(batch.group_ids if stage == "group" else batch.task_ids):
            members = members[active[members]]
            if len(members) == 0:
                continue
            chains = _tie_chains(values[members], tie_tolerance)
            values[members] = _gaussian_image(values[members], chains)
            if drop_zero_variance and int(chains.max()) == 0:
                active[members] = False
    if unit_variance:
        for _, members in _sets(batch.task_ids):
            members = members[active[members]]
            std = _moments(values[members].sort().values)[1] if len(members) else 0.0
            if std > 0.0:
                values[members] /= std
    return values


def set_statistics(batch: RewardBatch, ids: Tensor, tie_tolerance: float) -> dict[str, Tensor]:
    """Return the columns of ``SetStatistics`` for the sets of ``ids``, int64 ``[N]``, with ids ascending."""
    values = _finite_values(batch)
    integers: dict[str, list[int]] = {"id": [], "count": [], "distinct": []}
    floats: dict[str, list[float]] = {"mean": [], "std": [], "min": [], "max": []}
    for set_id, members in _sets(ids):
        ordered = values[members].sort().values
        mean, std = _moments(ordered)
        integers["id"].append(set_id)
        integers["count"].append(len(members))
        integers["distinct"].append(int(_tie_chains(ordered, tie_tolerance).max()) + 1)
        floats["mean"].append(mean)
        floats["std"].append(std)
        floats["min"].append(ordered[0].item())
        floats["max"].append(ordered[-1].item())
    columns = {name: torch.tensor(column, dtype=torch.int64) for name, column in integers.items()}
    return columns | {name: torch.tensor(column, dtype=torch.float64) for name, column in floats.items()}


def _finite_values(batch: RewardBatch) -> Tensor:
    bad = first_non_finite(batch.rewards)
    if bad is not None:
        raise ValueError(non_finite_message(batch, bad, f"row {bad}"))
    return batch.rewards.double() + 0.0  # + 0.0: a copy, and -0 becomes +0


def _sets(ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (id, indices of its rollouts), with ids ascending."""
    unique, counts = ids.unique(return_counts=True)
    members = ids.argsort(stable=True).split(counts.tolist())
    yield from zip(unique.tolist(), members, strict=True)


def _tie_chains(values: Tensor, tie_tolerance: float) -> Tensor:
    """Return the index of the chain of tied values that each value belongs to, int64 ``[n]``, ascending by value."""
    ordered, order = values.sort()
    steps = ordered.diff()
    splits = (steps != 0) & ~(steps < tie_tolerance)
    chains = torch.zeros(len(values), dtype=torch.int64)
    chains[order[1:]] = splits.cumsum(0)
    return chains


def _gaussian_image(values: Tensor, chains: Tensor) -> Tensor:
    """Return the optimal-transport image ``[n]``: midpoint quantiles of N(0, 1) by rank, averaged over each chain."""
    n = len(values)
    if int(chains.max()) == 0:
        return torch.zeros(n, dtype=torch.float64)
    lower = torch.special.ndtri((torch.arange(n // 2, dtype=torch.float64) + 0.5) / n)
    quantiles = torch.cat([lower, torch.zeros(n % 2, dtype=torch.float64), -lower.flip(0)])
    sums = torch.zeros(int(chains.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, chains.sort().values, quantiles)
    return (sums / chains.bincount())[chains]


def _moments(ordered: Tensor) -> tuple[float, float]:
    """Return mean and population standard deviation of ascending values, rescaled where squares leave the range."""
    largest = float(ordered.abs().max())
    extreme = largest > 0.0 and not 2.0**-400 <= largest <= 2.0**400
    exponent = max(math.frexp(largest)[1] - 1, -1000) if extreme else 0
    scaled = ordered * math.ldexp(1.0, -exponent)
    mean = scaled.mean().clamp(scaled[0], scaled[-1])
    std = (scaled - mean).square().mean().sqrt()
    return math.ldexp(mean.item(), exponent), math.ldexp(std.item(), exponent)
