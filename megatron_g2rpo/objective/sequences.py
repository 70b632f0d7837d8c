# SPDX-License-Identifier: Apache-2.0
"""Sums and means over each sequence of a packed row, also where several ranks share the tokens of a sequence.

Shape letters: ``S`` tokens of (a share of) a packed row, ``N`` sequences of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: the ``Sequences.reduce`` for a rank that shares its sequences with no other rank."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The assignment of the tokens of (a share of) a packed row to its sequences.

    Sums carry no gradient, so that they may cross ranks: gradients flow only through each token's own log-probability.

    Attributes:
        ids: int64 ``[S]``, 0..N-1 at response tokens that the loss counts; -1 elsewhere.
        size: number of sequences, N.
        reduce: sums a tensor over the ranks that hold other tokens of the same sequences (context-parallel peers). A
            collective, so ``sum``, ``counts`` and ``mean`` are too; each calls it once.

    Raises:
        ValueError: ``ids`` is not int64 ``[S]``.
    """

    ids: Tensor
    size: int
    reduce: Callable[[Tensor], Tensor] = identity

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise ValueError(f"ids must be int64 [S], got {self.ids.dtype} {list(self.ids.shape)}")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values [S]`` over the tokens of each sequence, on all ranks: float64 ``[N]``."""
        return self._reduced(self._local_sum(values))

    def counts(self) -> Tensor:
        """Return the number of tokens of each sequence, on all ranks: float64 ``[N]``."""
        return self.sum(torch.ones_like(self.ids))

    def mean(self, values: Tensor) -> Tensor:
        """Return at each token the mean of ``values [S]`` over its whole sequence: ``[S]``, 0 where ``ids`` is -1."""
        both = torch.stack([self._local_sum(values), self._local_sum(torch.ones_like(self.ids))])
        sums, counts = self._reduced(both)
        # 0 / 0 of a sequence without tokens stays in the table: no token looks it up.
        means = torch.cat([sums.new_zeros(1), sums / counts])
        return means[self.ids + 1].to(values.dtype)

    def _local_sum(self, values: Tensor) -> Tensor:
        if values.shape != self.ids.shape:
            raise ValueError(f"values must have the shape of ids {list(self.ids.shape)}, got {list(values.shape)}")
        # The first bin takes the tokens of no sequence, so that ids below -1 or above N-1 are out of range.
        bins = torch.zeros(self.size + 1, dtype=torch.float64, device=self.ids.device)
        return bins.index_add_(0, self.ids + 1, values.detach().double())[1:]

    def _reduced(self, sums: Tensor) -> Tensor:
        with torch.no_grad():
            return self.reduce(sums)
