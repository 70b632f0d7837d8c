# SPDX-License-Identifier: Apache-2.0
"""How megatron-core's optimizers hold a parameter's state: whole on every data-parallel rank, or in shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn


def single(optimizer: MegatronOptimizer) -> Any:
    """Return the one optimizer of a policy, out of its chain."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if len(parts) != 1:
        raise NotImplementedError(f"a policy has one optimizer, not {len(parts)}: it has no experts")
    return parts[0]


def keeps_main_copies(optimizer: Any) -> bool:
    """Return whether the optimizer updates float32 copies of the parameters."""
    return optimizer.config.params_dtype is not torch.float32


@dataclass(frozen=True)
class Spread:
    """How a parameter's optimizer state is spread over data-parallel ranks.

    The owner saves the state, and gets the elements that it lacks from the other ranks.

    Attributes:
        parameter: the parameter.
        pieces: the elements of the flattened parameter whose state a rank holds, by data-parallel rank.
    """

    parameter: nn.Parameter
    pieces: Mapping[int, slice]

    @property
    def owner(self) -> int:
        """The first data-parallel rank that holds a piece."""
        return min(self.pieces)


def spreads(optimizer: DistributedOptimizer) -> list[Spread]:
    """Return the spread of every parameter, in the order of the buffers, which is the same on all ranks of the group.

    Each rank has an equal share of every bucket; parameters lie in buckets one after the other, with padding between.
    """
    found = []
    for buffer in optimizer.buffers:
        for parameter, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            share = bucket.grad_data.numel() // optimizer.data_parallel_group.size()
            first, last = start - bucket.offset, end - bucket.offset
            pieces = {
                rank: slice(max(first, rank * share) - first, min(last, (rank + 1) * share) - first)
                for rank in range(first // share, (last - 1) // share + 1)
            }
            found.append(Spread(parameter, pieces))
    return found


def piece(optimizer: DistributedOptimizer, parameter: nn.Parameter) -> Tensor:
    """Return this rank's flat piece of a parameter (under bf16, of its float32 copy)."""
    group, order = optimizer.model_param_group_index_map[parameter]
    return optimizer.param_groups[group]["params"][order]


def main_copy(optimizer: MegatronOptimizer, parameter: nn.Parameter, spread: Spread | None) -> Tensor:
    """Return a parameter's whole float32 copy, on its device. A collective of the data-parallel ranks.

    Args:
        optimizer: an optimizer that keeps such copies.
        parameter: the parameter.
        spread: how the copy is spread over the ranks; None where each has it whole.
    """
    if spread is None:
        main: Any = parameter
        return main.main_param
    part = single(optimizer)
    group: Any = part.data_parallel_group
    whole = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
    for rank, where in spread.pieces.items():
        if rank == group.rank():
            whole[where] = piece(part, parameter).detach()
        dist.broadcast(whole[where], group=group, group_src=rank)
    return whole.view(parameter.shape)
