# SPDX-License-Identifier: Apache-2.0
"""Two context-parallel ranks in one process, for what is computed over ``Sequences``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences

R = TypeVar("R")


def on_two_ranks(ids: Tensor, size: int, ranks: Tensor, call: Callable[[Sequences, Tensor], R]) -> list[R]:
    """Results of ``call`` on rank 0 and on rank 1, as if ``reduce`` were an all-reduce between them.

    Args:
        ids: int64 ``[S]`` of the whole row.
        size: N.
        ranks: ``[S]``, 0 or 1: who holds the token.
        call: gets the rank's share of the sequences and, bool ``[S]``, which tokens of the row it holds. It is called
            twice per rank: first to learn what the rank sends.
    """
    sent: list[list[Tensor]] = [[], []]
    for rank in (0, 1):
        mine, own = sent[rank], ranks == rank
        call(Sequences(ids=ids[own], size=size, reduce=lambda sums, mine=mine: mine.append(sums.clone()) or sums), own)
    results = []
    for rank in (0, 1):
        received, own = iter(sent[1 - rank]), ranks == rank
        share = Sequences(ids=ids[own], size=size, reduce=lambda sums, received=received: sums + next(received))
        results.append(call(share, own))
        assert next(received, None) is None, "the ranks call reduce a different number of times"
    return results
