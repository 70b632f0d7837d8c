# SPDX-License-Identifier: Apache-2.0
"""The layout of a packed row for the core attention: who attends to whom, from its segments and their parents alone.

A token attends to its own segment up to itself, and to all of the segment's parent (``types.PackedBatch``). Under
context parallelism a rank's queries are chunks of segments (``layouts.context_parallel``), and keys and values are
those of all ranks, gathered.

Shape letters: N pieces of a bucket, Q / K the largest number of queries / keys of its pieces, T real queries, U keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_g2rpo.policy.layouts.attention_pieces import Piece, buckets_of, pieces_of_row
from megatron_g2rpo.policy.layouts.context_parallel import gathered_places
from megatron_g2rpo.policy.rotary import Rotation
from megatron_g2rpo.types import PackedBatch


@dataclass(frozen=True)
class Bucket:
    """Pieces of segments, similar in length, as a padded batch for the local core attention.

    A piece is consecutive queries of a segment; its keys are those of the segment's parent, then those of the segment
    up to the piece's last query.

    Attributes:
        queries: int64 ``[N, Q]``, index of this rank's token in every query slot; padding repeats the piece's last one.
        keys: int64 ``[N, K]``, index into the gathered keys; padding repeats the piece's last one.
        mask: bool ``[N, 1, Q, K]``, True where query q may attend to key k; None when every piece is a whole segment
            without a parent and ``is_causal`` suffices (padded keys then follow every real query).
        slots: int64 ``[T]``, index of the real queries among the flattened query slots.
        tokens: int64 ``[T]``, index of this rank's token in each of these slots.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    slots: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Spans:
    """Pieces of segments side by side, without padding, for attention over sequences of different lengths.

    Each piece's last query attends to all of its keys, and each query before it to one key less: causal, aligned at the
    bottom right.

    Attributes:
        queries: int64 ``[T]``, index of this rank's token, piece by piece.
        keys: int64 ``[U]``, index into the gathered keys, piece by piece: the parent's, then the segment's own.
        cu_seqlens_q, cu_seqlens_kv: int32 ``[N + 1]``, where each piece begins among the queries and among the keys.
        max_seqlen_q, max_seqlen_kv: the largest number of queries and of keys of a piece.
    """

    queries: Tensor
    keys: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int


@dataclass
class PackedRowParams(PackedSeqParams):
    """The layout of one packed row, which megatron-core passes through to the core attention.

    ``qkv_format`` stays ``sbhd``: rotary angles come per token (from three position axes), and the ``thd`` path of
    megatron-core's RoPE would slice them by sequence.

    Attributes:
        buckets: the row's pieces for the local core attention; empty for Transformer Engine's.
        spans: the row's pieces for Transformer Engine's attention, if a segment of the row has a parent, and this rank
            has a query: offsets alone say all of other rows.
        has_parents: whether a segment of the row has a parent; the same on all ranks.
        rotation: rotates queries and keys in the local core attention; None for Transformer Engine's, before which
            megatron-core has rotated them.
    """

    buckets: tuple[Bucket, ...] = ()
    spans: Spans | None = None
    has_parents: bool = False
    rotation: Rotation | None = None


def packed_row_params(batch: PackedBatch, size: int = 1, rank: int = 0, *, buckets: bool = True) -> PackedRowParams:
    """Lay a packed row's segments out for the core attention, once per micro-batch.

    Args:
        batch: the row, or a rank's share of it: only ``cu_seqlens*`` and ``parents`` are read.
        size: C, the number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
        buckets: whether to make the buckets of the local core attention; Transformer Engine needs offsets, and the
            spans of a row with parents.
    """
    device = batch.tokens.device
    # One wait for the GPU here; every size below would be one more.
    count = len(batch.cu_seqlens)
    numbers = torch.cat((batch.cu_seqlens, batch.cu_seqlens_padded, batch.parents.to(batch.cu_seqlens.dtype))).tolist()
    real, padded, parents = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
    lengths = [end - start for start, end in pairwise(real)]
    longest = max(end - start for start, end in pairwise(padded))
    has_parents = max(parents) >= 0
    # Transformer Engine takes the very same tensor as its sign that nothing is padded, and then allows more kernels.
    cu_seqlens_padded = batch.cu_seqlens if real == padded else batch.cu_seqlens_padded
    pieces = pieces_of_row(lengths, padded, size, rank, parents) if buckets or has_parents else []
    places = None if size == 1 or not pieces else gathered_places(torch.tensor(padded, dtype=torch.int32), size)
    return PackedRowParams(
        qkv_format="sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=tuple(_bucket(members, places, device) for members in buckets_of(pieces)) if buckets else (),
        spans=_spans(pieces, places, device) if pieces and not buckets else None,
        has_parents=has_parents,
    )


def _bucket(pieces: list[Piece], places: Tensor | None, device: torch.device) -> Bucket:
    token, first, length, start, prefix, prefix_start = _columns(pieces)[..., None]
    query, key = torch.arange(int(length.max())), torch.arange(max(piece.keys for piece in pieces))
    queries = token + torch.minimum(query, length - 1)
    keys = _key_places(torch.minimum(key, prefix + first + length - 1), start, prefix, prefix_start)
    real = query < length
    slots = real.flatten().nonzero().squeeze(1)
    mask = None
    if places is not None:
        keys = places[keys]
    if places is not None or pieces[0].prefix:  # buckets_of: all have one, or none
        # Padding repeats the last key, which every place of the mask beyond it hides.
        mask = (key <= (prefix + first + torch.minimum(query, length - 1))[..., None])[:, None].to(device)
    return Bucket(
        queries=queries.to(device),
        keys=keys.to(device),
        mask=mask,
        slots=slots.to(device),
        tokens=queries[real].to(device),
    )


def _spans(pieces: list[Piece], places: Tensor | None, device: torch.device) -> Spans:
    queries = torch.cat([torch.arange(piece.token, piece.token + piece.length) for piece in pieces])
    keys = torch.cat([_key_places(torch.arange(piece.keys), *_columns([piece])[3:]) for piece in pieces])
    return Spans(
        queries=queries.to(device),
        keys=(keys if places is None else places[keys]).to(device),
        cu_seqlens_q=_offsets([piece.length for piece in pieces], device),
        cu_seqlens_kv=_offsets([piece.keys for piece in pieces], device),
        max_seqlen_q=max(piece.length for piece in pieces),
        max_seqlen_kv=max(piece.keys for piece in pieces),
    )


def _columns(pieces: Sequence[Piece]) -> Tensor:
    """Return the attributes of the pieces as int64 ``[6, N]``, in the order of their definition."""
    return torch.tensor([[p.token, p.first, p.length, p.start, p.prefix, p.prefix_start] for p in pieces]).T


def _key_places(key: Tensor, start: Tensor, prefix: Tensor, prefix_start: Tensor) -> Tensor:
    """Return the place in the row of a piece's key, given its number among the piece's keys."""
    return key + torch.where(key < prefix, prefix_start, start - prefix)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
