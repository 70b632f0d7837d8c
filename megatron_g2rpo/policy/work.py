# SPDX-License-Identifier: Apache-2.0
"""What the policy's passes compute of packed rows, and what sharing prompts saves of it.

A row is counted whole, whatever ranks share it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_g2rpo.models.flops import causal_pairs
from megatron_g2rpo.types import NO_LABEL, PackedBatch


@dataclass(kw_only=True)
class RowWork:
    """What passes over packed rows computed; it adds up.

    Attributes:
        tokens: tokens that went through the layers, without padding.
        padding: tokens of padding.
        saved: tokens that would have gone through the layers besides, had no sequence shared its prompt.
        pairs: pairs of a query and a key of the core attention.
        labels: tokens whose logits were computed.
    """

    tokens: int = 0
    padding: int = 0
    saved: int = 0
    pairs: float = 0.0
    labels: int = 0

    def __add__(self, other: RowWork) -> RowWork:
        return RowWork(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def __sub__(self, other: RowWork) -> RowWork:
        return RowWork(**{each.name: getattr(self, each.name) - getattr(other, each.name) for each in fields(self)})


def row_work(batch: PackedBatch) -> RowWork:
    """Return what one pass over a packed row computes.

    Args:
        batch: the whole row, on the CPU.
    """
    sequences, parents = batch.sequence_ids.tolist(), batch.parents.tolist()
    # A row of padding has a segment, of padding, and no sequence.
    lengths = batch.cu_seqlens.diff().tolist() if sequences else []
    pairs = sum(
        causal_pairs(length, lengths[parent] if parent >= 0 else 0)
        for length, parent in zip(lengths, parents, strict=False)
    )
    # A sequence by itself has its trunk's tokens too, and its last token, which a branch leaves out.
    unshared = sum(
        length + (lengths[parent] + 1 if parent >= 0 else 0)
        for length, parent, sequence in zip(lengths, parents, sequences, strict=False)
        if sequence >= 0
    )
    tokens = sum(lengths)
    return RowWork(
        tokens=tokens,
        padding=len(batch.tokens) - tokens,
        saved=unshared - tokens,
        pairs=pairs,
        labels=int((batch.labels != NO_LABEL).sum()),
    )


@dataclass(kw_only=True)
class Work:
    """What a policy's passes computed since it was built.

    Attributes:
        forward: of passes without gradient: of old log-probabilities, entropies and the reference policy.
        trained: of passes that a backward pass follows: of updates, and of each task's own gradient.
    """

    forward: RowWork
    trained: RowWork

    @classmethod
    def none(cls) -> Work:
        """Return the work of a policy that has done nothing."""
        return cls(forward=RowWork(), trained=RowWork())
