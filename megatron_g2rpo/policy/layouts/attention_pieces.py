# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of core attention: the pieces of a packed row's segments on one rank, and their buckets.

Under context parallelism a rank's queries are chunks of segments (``layouts.context_parallel``), and each chunk sees
all keys of its segment up to its own end, after all keys of the segment's parent. For the local core attention pieces
of similar size are padded to one batch, called a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of one segment that this rank holds.

    Attributes:
        token: index, among this rank's tokens, of the piece's first query.
        first: place of that query in its segment.
        length: number of queries in the piece, padding excluded.
        start: place in the row at which the segment begins.
        prefix: number of tokens of the segment's parent, which all queries attend to; 0 without one.
        prefix_start: place in the row at which the parent begins.
    """

    token: int
    first: int
    length: int
    start: int
    prefix: int = 0
    prefix_start: int = 0

    @property
    def keys(self) -> int:
        """Number of keys that the piece's last query attends to."""
        return self.prefix + self.first + self.length


def pieces_of_row(
    lengths: Sequence[int], offsets: Sequence[int], size: int, rank: int, parents: Sequence[int] | None = None
) -> list[Piece]:
    """Return the pieces of a packed row that one context-parallel rank holds; pieces of padding only are left out.

    Args:
        lengths: number of tokens of each segment, without padding.
        offsets: where each segment begins in the row, padding included, and where the last one ends.
        size: number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
        parents: number of the segment that each segment continues, -1 for none; None: none continues another.
    """
    pieces = []
    for number, (length, (start, end)) in enumerate(zip(lengths, pairwise(offsets), strict=True)):
        parent = -1 if parents is None else parents[number]
        prefix, prefix_start = (lengths[parent], offsets[parent]) if parent >= 0 else (0, 0)
        if size == 1:
            chunks = [(start, 0, end - start)]
        else:
            chunk = (end - start) // (2 * size)
            chunks = [
                (start // size + half * chunk, index * chunk, chunk)
                for half, index in enumerate((rank, 2 * size - 1 - rank))
            ]
        for token, first, most in chunks:
            count = min(most, length - first)
            if count > 0:
                pieces.append(Piece(token, first, count, start, prefix, prefix_start))
    return pieces


def buckets_of(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Group pieces of similar size into buckets.

    The numbers of queries of a bucket's pieces lie between two consecutive powers of two, and so do those of its keys,
    so that padding at most doubles each. Pieces with and without a prefix are apart: only the latter may need no mask.
    """
    classes: dict[tuple[bool, int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        key = (piece.prefix > 0, (piece.length - 1).bit_length(), (piece.keys - 1).bit_length())
        classes[key].append(piece)
    return [members for _, members in sorted(classes.items())]
