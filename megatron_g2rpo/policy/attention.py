# SPDX-License-Identifier: Apache-2.0
"""The core attention seam, for packed rows: every sequence of the row attends causally to itself only.

megatron-core's local ``DotProductAttention`` refuses packed sequences and context parallelism, so the local layers have
one of their own: sequences of similar length are laid out as one padded batch and go through torch's
``scaled_dot_product_attention``, so that work grows with the sum of squared lengths, not with the square of the row.
Under context parallelism a rank's queries are chunks of sequences (``layouts.context_parallel``), and keys and values
are gathered from all ranks; the gradient is scattered back by the gather's own backward.

On a GPU Transformer Engine's attention takes the same place.

Shape letters: S this rank's tokens of the row, C context-parallel ranks, N pieces of a bucket, Q / K the largest number
of queries / keys of its pieces, T real queries of a bucket, H query heads, G key/value heads, D head dimension (H and G
count this tensor-parallel rank's heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_g2rpo.policy.layouts.attention_pieces import Piece, buckets_of, pieces_of_row
from megatron_g2rpo.policy.layouts.context_parallel import gathered_places
from megatron_g2rpo.types import PackedBatch


@dataclass(frozen=True)
class Bucket:
    """Pieces of sequences, similar in length, as a padded batch.

    A piece is consecutive queries of a sequence, with all keys up to the last of them.

    Attributes:
        queries: int64 ``[N, Q]``, index of this rank's token in every query slot; padding repeats the piece's last one.
        keys: int64 ``[N, K]``, index into the gathered keys; padding repeats the piece's last one.
        mask: bool ``[N, 1, Q, K]``, True where query q may attend to key k; None when every piece is a whole sequence
            and ``is_causal`` suffices (padded keys then follow every real query).
        slots: int64 ``[T]``, index of the real queries among the flattened query slots.
        tokens: int64 ``[T]``, index of this rank's token in each of these slots.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    slots: Tensor
    tokens: Tensor


@dataclass
class PackedRowParams(PackedSeqParams):
    """The layout of one packed row, which megatron-core passes through to the core attention.

    ``qkv_format`` stays ``sbhd``: rotary angles come per token (from three position axes), and the ``thd`` path of
    megatron-core's RoPE would slice them by sequence.

    Attributes:
        buckets: the row's pieces for the local core attention; empty for Transformer Engine's.
    """

    buckets: tuple[Bucket, ...] = ()


def packed_row_params(batch: PackedBatch, size: int = 1, rank: int = 0, *, buckets: bool = True) -> PackedRowParams:
    """Lay a packed row's sequences out for the core attention, once per micro-batch.

    Args:
        batch: the row, or a rank's share of it: only ``cu_seqlens*`` are read.
        size: C, the number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
        buckets: whether to make the buckets of the local core attention; Transformer Engine needs offsets only.
    """
    device = batch.tokens.device
    # One wait for the GPU here; every size below would be one more.
    real, padded = torch.stack((batch.cu_seqlens, batch.cu_seqlens_padded)).tolist()
    lengths = [end - start for start, end in pairwise(real)]
    longest = max(end - start for start, end in pairwise(padded))
    # Transformer Engine takes the very same tensor as its sign that nothing is padded, and then allows more kernels.
    cu_seqlens_padded = batch.cu_seqlens if real == padded else batch.cu_seqlens_padded
    return PackedRowParams(
        qkv_format="sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=_buckets(pieces_of_row(lengths, padded, size, rank), padded, size, device) if buckets else (),
    )


def _buckets(pieces: list[Piece], padded: list[int], size: int, device: torch.device) -> tuple[Bucket, ...]:
    places = None if size == 1 else gathered_places(torch.tensor(padded, dtype=torch.int32), size)
    return tuple(_bucket(members, places, device) for members in buckets_of(pieces))


def _bucket(pieces: list[Piece], places: Tensor | None, device: torch.device) -> Bucket:
    token, first, length, start = torch.tensor([[p.token, p.first, p.length, p.start] for p in pieces]).T[..., None]
    query, key = torch.arange(int(length.max())), torch.arange(int((first + length).max()))
    queries = token + torch.minimum(query, length - 1)
    keys = start + torch.minimum(key, first + length - 1)
    real = query < length
    slots = real.flatten().nonzero().squeeze(1)
    mask = None
    if places is not None:
        keys = places[keys]
        # Padding repeats the last key, which every position of the mask beyond it hides.
        mask = (key <= (first + torch.minimum(query, length - 1))[..., None])[:, None].to(device)
    return Bucket(
        queries=queries.to(device),
        keys=keys.to(device),
        mask=mask,
        slots=slots.to(device),
        tokens=queries[real].to(device),
    )


class PackedCoreAttention(nn.Module):
    """Causal attention within each sequence of a packed row. Head counts are read from tensor shapes.

    The constructor takes what megatron-core passes to a core attention and keeps what it needs.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Let every query attend to the keys of its own sequence up to its own position.

        Args:
            query: ``[S, 1, H, D]``.
            key, value: ``[S, 1, G, D]``.
            attention_mask, attention_bias: must be None; the row's layout says which keys a query attends to.
            packed_seq_params: the row's layout, a ``PackedRowParams``.

        Returns:
            ``[S, 1, H * D]``; zero on padding.
        """
        row = _checked(packed_seq_params, attention_mask, attention_bias)
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context_group is not None:
            both = gather_from_sequence_parallel_region(
                input_=torch.stack((k, v), dim=1), tensor_parallel_output_grad=True, group=self.context_group
            )
            k, v = both.unbind(dim=1)
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        context = torch.zeros_like(q)
        # A rank that holds only padding attends to nothing, but stays in the graph: its peers wait for its part of the
        # gathered keys' gradient.
        if row.buckets:
            parts = torch.cat([self._attend(bucket, q, k, v) for bucket in row.buckets])
            context = context.index_copy(0, torch.cat([bucket.tokens for bucket in row.buckets]), parts)
        else:
            context = context + 0 * (q.sum() + k.sum() + v.sum())
        return context.flatten(1).unsqueeze(1)

    def _attend(self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded_q = q[bucket.queries].transpose(1, 2)
        padded_k, padded_v = (x[bucket.keys].transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(
            padded_q,
            padded_k,
            padded_v,
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=self.softmax_scale,
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots)


class TransformerEngineCoreAttention(nn.Module):
    """Causal attention within each sequence of a packed row, computed by Transformer Engine on GPUs.

    It calls megatron-core's wrapper and is thin on purpose: it cannot run on a CPU, and a contract test holds what it
    passes against megatron-core's signatures. Context-parallel communication is Transformer Engine's own
    (``cp_comm_type``).
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.attention = TEDotProductAttention(**arguments)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Let every query attend within its own sequence; shapes are those of ``PackedCoreAttention.forward``."""
        row = _checked(packed_seq_params, attention_mask, attention_bias)
        # Transformer Engine looks at strides and offsets. Of a row of one token, the share of an idle rank, a slice of
        # the projection's output is contiguous for torch, which does not look at the strides of dimensions of size 1.
        q, k, v = (
            x.squeeze(1) if len(x) > 1 else x.squeeze(1).clone(memory_format=torch.contiguous_format)
            for x in (query, key, value)
        )
        context = self.attention(
            query=q,
            key=k,
            value=v,
            attention_mask=None,
            attn_mask_type=attn_mask_type,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=row.cu_seqlens_q,
                cu_seqlens_kv=row.cu_seqlens_kv,
                cu_seqlens_q_padded=row.cu_seqlens_q_padded,
                cu_seqlens_kv_padded=row.cu_seqlens_kv_padded,
                max_seqlen_q=row.max_seqlen_q,
                max_seqlen_kv=row.max_seqlen_kv,
            ),
        )
        return context.reshape(len(query), 1, -1)


def _checked(params: PackedSeqParams | None, mask: Tensor | None, bias: Tensor | None) -> PackedRowParams:
    if not isinstance(params, PackedRowParams) or mask is not None or bias is not None:
        raise ValueError("packed core attention takes PackedRowParams, no attention mask and no bias")
    return params
