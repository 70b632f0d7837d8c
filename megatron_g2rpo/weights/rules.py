# SPDX-License-Identifier: Apache-2.0
"""How a Megatron parameter is made of Hugging Face tensors, and cut over tensor-parallel ranks.

A rule maps between the full Hugging Face tensors of one Megatron parameter and its per-rank shards, both ways, exactly:
no arithmetic, only slicing and concatenation. Sharding slices before it concatenates: of a tensor that is mapped from a
file, only the slices are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def padded_rows(rows: int, size: int) -> int:
    """Return the rows of a vocabulary matrix that ``size`` ranks hold together: ``rows`` rounded up to a multiple."""
    return -(-rows // size) * size


class ShardRule(Protocol):
    """One way to shard a parameter. ``size`` is the tensor-parallel size, ``rank`` the rank in that group."""

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's Megatron tensor, made from the full Hugging Face tensors."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return the full Hugging Face tensors, made from all ranks' Megatron tensors in rank order.

        They may be views of the Megatron tensors.
        """
        ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return full[0]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Each rank holds a contiguous chunk along one axis.

    Attributes:
        axis: 0 for column-parallel weights, 1 for row-parallel ones.
    """

    axis: int

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return full[0].chunk(size, dim=self.axis)[rank]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_joined(shards, self.axis)]


@dataclass(frozen=True)
class Vocabulary:
    """Each rank holds rows of an embedding or output matrix, padded with zero rows to a multiple of the group size.

    Attributes:
        size: number of rows without padding, which is the vocabulary's size.
    """

    size: int

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        rows = padded_rows(self.size, size) // size
        mine = full[0][rank * rows : (rank + 1) * rows]
        return torch.cat([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])])

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_joined(shards)[: self.size]]


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value projections, interleaved by query group: ``[q_0 .. q_(H/G-1), k, v]`` per group.

    The interleaved rows are cut into equal chunks, also where there are more ranks than groups and a chunk holds part
    of a group: megatron-core then gathers the projection's output before it takes heads from it
    (``SelfAttention.get_query_key_value_tensors``).

    Attributes:
        heads: H, number of query heads.
        groups: G, number of key/value heads.
        head_dim: number of rows of one head.
    """

    heads: int
    groups: int
    head_dim: int

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        rows = (self.heads + 2 * self.groups) * self.head_dim // size
        lengths = [heads * self.head_dim for heads in (self.heads // self.groups, 1, 1)]
        # Slices of the q, k and v of one group after another; `start` is where this rank's rows begin, seen from there.
        slices, start = [], rank * rows
        for group in range(self.groups):
            for part, length in zip(full, lengths, strict=True):
                first, end = max(start, 0), min(start + rows, length)
                if first < end:
                    slices.append(part[group * length + first : group * length + end])
                start -= length
        return torch.cat(slices)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        per_group = self.heads // self.groups
        joined = _joined(shards).unflatten(0, (self.groups, per_group + 2, self.head_dim))
        return [part.flatten(0, 2) for part in joined.split([per_group, 1, 1], dim=1)]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections of a gated MLP: each rank holds its gate chunk, then its up chunk."""

    def shard(self, full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([part.chunk(size)[rank] for part in full])

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[part] for half in halves]) for part in (0, 1)]


def _joined(shards: Sequence[Tensor], axis: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=axis)
