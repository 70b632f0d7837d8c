# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the local core attention: the pieces of a packed row's sequences on one rank, and their buckets.

Under context parallelism a rank's queries are chunks of sequences (``layouts.context_parallel``), and each chunk sees
all keys of its sequence up to its own end. Pieces of similar size are padded to one batch: a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """A run of one sequence's queries on this rank.

    Attributes:
        token: this rank's token that the run begins with.
        first: its position in the sequence.
        length: tokens of the run, padding excluded.
        start: row position of the sequence.
    """

    token: int
    first: int
    length: int
    start: int

    @property
    def keys(self) -> int:
        """Tokens that the run's last query sees."""
        return self.first + self.length


def pieces_of_row(lengths: Sequence[int], offsets: Sequence[int], size: int, rank: int) -> list[Piece]:
    """Pieces that a context-parallel rank has of a row; those of padding alone are left out.

    Args:
        lengths: real tokens of each sequence.
        offsets: where each sequence begins in the row, padding counted, and where the last one ends.
        size: context-parallel ranks.
        rank: one of them.
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
            run = min(chunk, length - first)
            if run > 0:
                pieces.append(Piece(token=start // size + half * chunk, first=first, length=run, start=start))
    return pieces


def buckets_of(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces by size: queries and keys of a bucket each lie within a power of two, so padding at most doubles them."""
    classes: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        classes[(piece.length - 1).bit_length(), (piece.keys - 1).bit_length()].append(piece)
    return [members for _, members in sorted(classes.items())]
