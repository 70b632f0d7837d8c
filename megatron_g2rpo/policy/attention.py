# SPDX-License-Identifier: Apache-2.0
"""Core attention of the local layer spec, for packed rows.

megatron-core's local ``DotProductAttention`` refuses packed sequences. Here every sequence of the row attends causally
to itself alone: sequences of similar length are laid out as one padded batch and go through torch's
``scaled_dot_product_attention``, so that work grows with the sum of squared lengths, not with the square of the row.

Shape letters: S tokens of the row, N sequences of a bucket, L longest of them, H query heads, G key/value heads,
D head dimension (H and G are this tensor-parallel rank's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, as a padded batch.

    Attributes:
        gather: int64 ``[N, L]``, row position of every slot; padding repeats the sequence's last token (it is causal:
            no real query looks at what follows it).
        slots: int64 ``[T]``, which flattened slots are real.
        row: int64 ``[T]``, the row position of each of them.
    """

    gather: Tensor
    slots: Tensor
    row: Tensor


@dataclass
class PackedRowParams(PackedSeqParams):
    """What megatron-core hands through to the core attention: the layout of one packed row.

    ``qkv_format`` stays ``sbhd``: rotary angles come per token (three position rows), and the ``thd`` path of
    megatron-core's RoPE would slice them by sequence.
    """

    buckets: tuple[Bucket, ...] = ()


def packed_row_params(cu_seqlens: Tensor) -> PackedRowParams:
    """Lay a row's sequences out in buckets, once per micro-batch.

    Args:
        cu_seqlens: int32 ``[n + 1]``, offsets of the sequences; they must cover the row.
    """
    device = cu_seqlens.device
    offsets = cu_seqlens.cpu().long()  # one wait for the GPU here; every size below would be one more
    starts, lengths = offsets[:-1], offsets[1:] - offsets[:-1]
    # A bucket holds lengths of one power of two: padding at most doubles it.
    classes = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    buckets = []
    for value in classes.unique().tolist():
        members = (classes == value) & (lengths > 0)
        if not bool(members.any()):
            continue
        start, length = starts[members], lengths[members]
        steps = torch.arange(int(length.max()))
        real = steps < length[:, None]
        gather = start[:, None] + torch.minimum(steps, length[:, None] - 1)
        slots = real.flatten().nonzero().squeeze(1)
        buckets.append(Bucket(gather=gather.to(device), slots=slots.to(device), row=gather[real].to(device)))
    longest = int(lengths.max()) if len(lengths) else 0
    return PackedRowParams(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=tuple(buckets),
    )


class PackedCoreAttention(nn.Module):
    """Causal attention within each sequence of a packed row. Head counts are read from tensor shapes.

    The constructor takes what megatron-core's ``build_module`` passes to a core attention and keeps what it needs.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs the gathering core attention, which is not in this version")
        self.softmax_scale = softmax_scale

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
        """Attend.

        Args:
            query: ``[S, 1, H, D]``.
            key, value: ``[S, 1, G, D]``.
            attention_mask, attention_bias: must be None; the row's layout says who sees whom.
            packed_seq_params: the row's layout, a ``PackedRowParams``.

        Returns:
            ``[S, 1, H * D]``.
        """
        if (
            not isinstance(packed_seq_params, PackedRowParams)
            or attention_mask is not None
            or attention_bias is not None
        ):
            raise ValueError("PackedCoreAttention takes PackedRowParams, no attention mask and no bias")
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        parts = []
        for bucket in packed_seq_params.buckets:
            padded_q, padded_k, padded_v = (x[bucket.gather].transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(padded_q, padded_k, padded_v, is_causal=True, scale=self.softmax_scale)
            parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots))
        order = torch.cat([bucket.row for bucket in packed_seq_params.buckets])
        context = torch.zeros_like(q).index_copy(0, order, torch.cat(parts))
        return context.flatten(1).unsqueeze(1)
