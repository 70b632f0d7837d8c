# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the local core attention: the pieces of a packed row's sequences on one rank, and their buckets.

Under context parallelism a rank's queries are chunks of sequences (``layouts.context_parallel``), and each chunk sees
all keys of its sequence up to its own end. Pieces of similar size are padded to one batch, called a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of one sequence that this rank holds.

    Attributes:
        token: index, among this rank's tokens, of the piece's first query.
        first: position of that query in its sequence.
        length: number of queries in the piece, padding excluded.
        start: position in the row at which the sequence begins.
    """

    token: int
    first: int
    length: int
    start: int

    @property
    def keys(self) -> int:
        """Number of keys that the piece's last query attends to."""
        return self.first + self.length


def pieces_of_row(lengths: Sequence[int], offsets: Sequence[int], size: int, rank: int) -> list[Piece]:
    """Return the pieces of a packed row that one context-parallel rank holds; pieces of padding only are left out.

    Args:
        lengths: number of tokens of each sequence, without padding.
        offsets: where each sequence begins in the row, padding included, and where the last one ends.
        size: number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
    """
    if size == 1:
        return [
            Piece(token=start, first=0, length=length, start=start)
            for length, start in zip(lengths, offsets[:-1], strict=True)
            if length
        ]
    pieces = []
    for length, (start, end) in zip(lengths, pairwise(offsets), strict=True):
        chunk = (end - start) // (2 * size)
        for half, index in enumerate((rank, 2 * size - 1 - rank)):
            first = index * chunk
            count = min(chunk, length - first)
            if count > 0:
                pieces.append(Piece(token=start // size + half * chunk, first=first, length=count, start=start))
    return pieces


def buckets_of(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Group pieces of similar size into buckets.

    The numbers of queries of a bucket's pieces lie between two consecutive powers of two, and so do those of its keys,
    so that padding at most doubles each.
    """
    classes: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        classes[(piece.length - 1).bit_length(), (piece.keys - 1).bit_length()].append(piece)
    return [members for _, members in sorted(classes.items())]
