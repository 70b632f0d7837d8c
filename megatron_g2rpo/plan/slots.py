# SPDX-License-Identifier: Apache-2.0
"""Sizes of what the core attention makes of a packed row: its queries, and the keys that it looks up for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from megatron_g2rpo.plan.rows import Row
from megatron_g2rpo.policy.layouts.attention_pieces import Piece, buckets_of, pieces_of_row


@dataclass(frozen=True)
class Slots:
    """Queries and keys of the core attention on one context-parallel rank, as it lays them out.

    Attributes:
        tokens: number of real queries, without padding.
        queries, keys: number of query slots and of key slots; padding of the local attention's buckets included, and a
            trunk's keys once for every piece of its branches.
        mask: number of elements of the local attention's masks (0 where ``is_causal`` suffices).
        copied: whether queries, keys and values are looked up into tensors of their own; Transformer Engine's attention
            takes rows without branches as they are.
    """

    tokens: int
    queries: int
    keys: int
    mask: int
    copied: bool = True


def bucket_slots(row: Row, size: int, rank: int) -> Slots:
    """Return the sizes of the padded batches that the local core attention makes of a packed row.

    Args:
        row: the whole packed row.
        size: number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
    """
    pieces = _pieces(row, size, rank)
    total = Slots(sum(piece.length for piece in pieces), 0, 0, 0)
    for members in buckets_of(pieces):
        count, longest = len(members), max(piece.length for piece in members)
        widest = max(piece.keys for piece in members)
        masked = size > 1 or members[0].prefix > 0  # buckets_of: all have one, or none
        total = Slots(
            tokens=total.tokens,
            queries=total.queries + count * longest,
            keys=total.keys + count * widest,
            mask=total.mask + (count * longest * widest if masked else 0),
        )
    return total


def span_slots(row: Row, size: int, rank: int) -> Slots:
    """Return the sizes of what Transformer Engine's attention is given of a packed row; it pads nothing.

    The arguments are those of ``bucket_slots``.
    """
    if max(row.parents) < 0:
        tokens = row.tokens // size
        return Slots(tokens, tokens, tokens, 0, copied=False)
    pieces = _pieces(row, size, rank)
    tokens = sum(piece.length for piece in pieces)
    return Slots(tokens, tokens, sum(piece.keys for piece in pieces), 0)


def widest_slots(row: Row, size: int, *, local: bool) -> Slots:
    """Return the sizes on the context-parallel rank that has the most query and key slots.

    Args:
        row: the whole packed row.
        size: number of context-parallel ranks.
        local: whether the core attention is the local one, not Transformer Engine's.
    """
    slots = bucket_slots if local else span_slots
    return max((slots(row, size, rank) for rank in range(size)), key=lambda s: (s.queries + s.keys, s.mask))


def _pieces(row: Row, size: int, rank: int) -> list[Piece]:
    return pieces_of_row(row.lengths, [0, *accumulate(row.padded)], size, rank, row.parents)
