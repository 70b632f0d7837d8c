# SPDX-License-Identifier: Apache-2.0
"""The core attention seam, for packed rows: who attends to whom derives from segments and their parents alone.

megatron-core's local ``DotProductAttention`` refuses packed sequences and context parallelism, so the local layers have
one of their own: pieces of similar length are laid out as one padded batch (``policy.packed_row``) and go through
torch's ``scaled_dot_product_attention``, so that work grows with the sum of squared lengths, not with the square of the
row. A branch's keys are its trunk's and its own: the trunk's are computed once and looked up by every branch, and the
gradient of the look-up adds up over the branches. Under context parallelism keys and values are gathered from all
ranks; the gradient is scattered back by the gather's own backward.

On a GPU Transformer Engine's attention takes the same place.

Shape letters: S this rank's tokens of the row, C context-parallel ranks, H query heads, G key/value heads, D head
dimension (H and G count this tensor-parallel rank's heads).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_g2rpo.policy.packed_row import Bucket, PackedRowParams


class PackedCoreAttention(nn.Module):
    """Causal attention within each segment of a packed row, after its parent. Head counts are read from tensor shapes.

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
        """Let every query attend to its segment's parent, and to its own segment up to itself.

        Args:
            query: ``[S, 1, H, D]``, not yet rotated by its position where the row has a rotation.
            key, value: ``[S, 1, G, D]``, the key as the query.
            attention_mask, attention_bias: must be None; the row's layout says which keys a query attends to.
            packed_seq_params: the row's layout, a ``PackedRowParams``.

        Returns:
            ``[S, 1, H * D]``; zero on padding.
        """
        row = _checked(packed_seq_params, attention_mask, attention_bias)
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if row.rotation is not None:
            q, k = row.rotation(q), row.rotation(k)
        k, v = _gathered(k, v, self.context_group)
        context = torch.zeros_like(q)
        # A rank that holds only padding attends to nothing, but stays in the graph: its peers wait for its part of the
        # gathered keys' gradient.
        if row.buckets:
            parts = torch.cat([self._attend(bucket, q, k, v) for bucket in row.buckets])
            context.index_copy_(0, torch.cat([bucket.tokens for bucket in row.buckets]), parts)
        else:
            context = context + 0 * (q.sum() + k.sum() + v.sum())
        return context.flatten(1).unsqueeze(1)

    def _attend(self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            _taken(q, bucket.queries),
            _taken(k, bucket.keys),
            _taken(v, bucket.keys),
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots)


class TransformerEngineCoreAttention(nn.Module):
    """Causal attention within each segment of a packed row, after its parent, by Transformer Engine on GPUs.

    It calls megatron-core's wrapper and is thin on purpose: it cannot run on a CPU, and a contract test holds what it
    passes against megatron-core's signatures. Rows without parents are Transformer Engine's own case, as is their
    context-parallel communication (``cp_comm_type``). In a row with parents the queries of a branch see more keys than
    there are queries: its pieces go through attention that is causal from the bottom right, with the keys of the trunk
    looked up for every branch, and under context parallelism gathered from all ranks before.
    """

    def __init__(self, *, config: Any, attention_type: str, pg_collection: Any = None, **arguments: Any) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        arguments |= {"pg_collection": pg_collection}
        self.attention = TEDotProductAttention(config=config, attention_type=attention_type, **arguments)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        # Without Transformer Engine's own exchange between ranks. With "self", its unfused attention would take it that
        # there are as many keys as queries.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        self.span_attention = TEDotProductAttention(config=alone, attention_type="cross", **arguments)

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
        if row.has_parents:
            return self._by_spans(row, query.squeeze(1), key.squeeze(1), value.squeeze(1))
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

    def _by_spans(self, row: PackedRowParams, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

        context = torch.zeros_like(q)
        k, v = _gathered(k, v, self.context_group)
        spans = row.spans
        if spans is None:  # see PackedCoreAttention.forward
            return (context + 0 * (q.sum() + k.sum() + v.sum())).flatten(1).unsqueeze(1)
        # Not through megatron-core's wrapper, whose mask types do not include this one.
        out = DotProductAttention.forward(
            self.span_attention,
            query_layer=q[spans.queries],
            key_layer=k[spans.keys],
            value_layer=v[spans.keys],
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=spans.cu_seqlens_q,
            cu_seqlens_kv=spans.cu_seqlens_kv,
            max_seqlen_q=spans.max_seqlen_q,
            max_seqlen_kv=spans.max_seqlen_kv,
        )
        return context.flatten(1).index_copy(0, spans.queries, out.reshape(len(spans.queries), -1)).unsqueeze(1)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens of ``[S, H, D]`` at ``[N, Q]`` as ``[N, H, Q, D]``; indexing takes longer, forth and back."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _gathered(k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return keys and values of all context-parallel ranks, in the order of ``context_parallel.gathered_places``."""
    if group is None:
        return k, v
    both = gather_from_sequence_parallel_region(
        input_=torch.stack((k, v), dim=1), tensor_parallel_output_grad=True, group=group
    )
    return both.unbind(dim=1)


def _checked(params: PackedSeqParams | None, mask: Tensor | None, bias: Tensor | None) -> PackedRowParams:
    if not isinstance(params, PackedRowParams) or mask is not None or bias is not None:
        raise ValueError("packed core attention takes PackedRowParams, no attention mask and no bias")
    return params
