# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that autograd keeps of the language layers between a micro-batch's forward and backward pass.

The module follows the local layers (``policy.layer_spec``, ``policy.norm``, ``policy.attention``, and megatron-core's
parallel linears, rotary embedding and gated MLP): which tensors each operation saves for its gradient, each storage
once.
docs/plan.md derives every line. Transformer Engine's fused layers save less; they are not modelled.

Shape letters: S tokens of a rank (its context-parallel share), s the same divided by the tensor-parallel ranks where
sequence parallelism is on, h hidden size, H query heads, G key/value heads, D head dimension, F MLP features (H, G and
F of this tensor-parallel rank), e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.plan.rows import Slots
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.policy.layouts.logit_chunks import LogitChunks
from megatron_g2rpo.weights.rules import padded_rows

FP32, INT64 = torch.float32.itemsize, torch.int64.itemsize


@dataclass(frozen=True)
class Sizes:
    """Sizes of the language model on one rank, by the module's shape letters.

    Attributes:
        tokens: S, tokens that the rank holds of a packed row.
        shared: s, tokens that the rank holds between tensor-parallel regions.
        hidden: h, the hidden size.
        heads: H, query heads of the rank.
        groups: G, key/value heads of the rank.
        head_dim: D, numbers of one head.
        features: F, MLP features of the rank.
        projected: heads of the query/key/value projection's output that the rank holds; more than
            ``heads + 2 * groups`` where ranks share a key/value head, because megatron-core then gathers the whole
            projection.
        columns: columns of the vocabulary on the rank that has the most.
        nbytes: e, bytes of an activation's element.
    """

    tokens: int
    shared: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    features: int
    projected: int
    columns: int
    nbytes: int


def sizes(text: Any, layout: Layout, row_tokens: int, nbytes: int) -> Sizes:
    """Return the language model's sizes on one rank.

    Args:
        text: the model's ``text_config``.
        layout: the parallel sizes.
        row_tokens: number of tokens of the whole packed row.
        nbytes: bytes of an activation's element.
    """
    tokens = row_tokens // layout.context
    kv, tensor = text.num_key_value_heads, layout.tensor
    projected = text.num_attention_heads + 2 * kv
    return Sizes(
        tokens=tokens,
        shared=tokens // tensor if layout.sequence_parallel else tokens,
        hidden=text.hidden_size,
        heads=text.num_attention_heads // tensor,
        groups=max(kv // tensor, 1),
        head_dim=head_dim(text),
        features=text.intermediate_size // tensor,
        projected=projected if kv < tensor else projected // tensor,
        columns=min(padded_rows(text.vocab_size, tensor) // tensor, text.vocab_size),
        nbytes=nbytes,
    )


def norm(rows: int, width: int, nbytes: int) -> int:
    """Return the bytes that ``policy.norm.RMSNorm`` keeps of a ``[rows, width]`` matrix.

    It keeps its input in float32, the reciprocal root of each matrix row, and the normalised rows. In float32 the first
    is the layer's own input, kept alive for this; in bfloat16 it is a copy.
    """
    return rows * (width * (FP32 + nbytes) + FP32)


def layer(size: Sizes, slots: Slots, *, selective: bool) -> int:
    """Return the bytes that autograd keeps of one layer.

    Args:
        size: the rank's sizes of the language model.
        slots: sizes of the core attention's padded batches.
        selective: whether the core attention is recomputed.
    """
    return attention(size, slots, selective=selective) + mlp(size)


def attention(size: Sizes, slots: Slots, *, selective: bool) -> int:
    """Return the bytes kept of input norm, projections, query and key norms, rotary embedding and core attention."""
    e, head = size.nbytes, size.head_dim
    kept = norm(size.shared, size.hidden, e)
    kept += e * size.shared * size.hidden  # input of the query/key/value projection
    kept += norm(size.tokens * size.heads, head, e) + norm(size.tokens * size.groups, head, e)
    kept += 4 * e * size.tokens * head  # cosines and sines, made once for queries and once for keys
    projection = e * size.tokens * size.projected * head
    if e == FP32:
        # Key norms keep a view, and with it the whole projection; query norms too, where no copy regroups the heads.
        kept += projection - FP32 * size.tokens * head * size.groups
        if size.heads == size.groups or size.groups == 1:
            kept -= FP32 * size.tokens * head * size.heads
    if selective:
        kept += e * size.tokens * (size.heads + size.groups) * head  # rotated queries and keys
        kept += 0 if e == FP32 else projection  # the values are a view of it
    else:
        kept += core_attention(size, slots)
    return kept + e * size.tokens * size.heads * head  # input of the output projection


def core_attention(size: Sizes, slots: Slots) -> int:
    """Return the bytes kept of the local core attention.

    ``scaled_dot_product_attention`` keeps padded queries, keys, values and outputs, log-sum-exps and masks.
    ``index_copy``, which puts the outputs back into the packed row, keeps the outputs once more, and their places.
    """
    e, width = size.nbytes, size.heads * size.head_dim
    kept = e * width * 2 * (slots.queries + slots.keys) + FP32 * size.heads * slots.queries + e * slots.mask
    return kept + slots.tokens * (e * width + INT64)


def mlp(size: Sizes) -> int:
    """Return the bytes kept of the MLP and the norm before it.

    The gated MLP keeps gate and up projection, activated gate, the sum ``up + 0``, and their product.
    """
    kept = norm(size.shared, size.hidden, size.nbytes) + size.nbytes * size.shared * size.hidden
    return kept + size.nbytes * size.tokens * 5 * size.features


@dataclass(frozen=True)
class Recompute:
    """The parts of the model that the backward pass recomputes: ``policy.megatron_cfg.recompute_*``.

    Attributes:
        granularity: None, ``selective`` (the core attention) or ``full`` (whole layers).
        method: under ``full``, ``uniform`` (all layers, in chunks) or ``block`` (only the first layers of a stage).
        layers: number of layers of a chunk under ``uniform``, number of recomputed layers under ``block``.
    """

    granularity: str | None
    method: str
    layers: int

    def chunks(self, layers: int) -> tuple[list[int], int]:
        """Return how a stage of so many layers is recomputed.

        Returns:
            Number of layers of each chunk of which only the input is kept; number of layers that are not recomputed.
        """
        if self.granularity != "full":
            return [], layers
        if self.method == "block":
            return [1] * min(self.layers, layers), max(layers - self.layers, 0)
        whole, rest = divmod(layers, self.layers)
        return [self.layers] * whole + ([rest] if rest else []), 0


def indices(slots: Slots, recompute: Recompute) -> int:
    """Return the bytes of the packed row's index tensors, which all layers share.

    What is recomputed needs each token's place a second time.
    """
    places = 1 if recompute.granularity is None else 2
    return INT64 * (slots.queries + slots.keys + places * slots.tokens)


def stage_layers(
    size: Sizes, slots: Slots, recompute: Recompute, layers: int, context_levels: int, *, first: bool
) -> int:
    """Return the bytes that autograd keeps of a stage's layers for one micro-batch.

    Args:
        size: the rank's sizes of the language model.
        slots: sizes of the core attention's padded batches.
        recompute: what is recomputed.
        layers: number of layers of the stage.
        context_levels: number of deepstack levels that travel through the stage's layers (0 without images or on later
            stages); a checkpointed layer keeps them with its input.
        first: whether the stage has the embedding. Under sequence parallelism a rank's share of the embeddings is a
            view of those of all tokens, so that keeping the share keeps all; what is recomputed starts from a copy.
    """
    chunks, whole = recompute.chunks(layers)
    kept = whole * layer(size, slots, selective=recompute.granularity == "selective")
    hidden = size.nbytes * size.shared * size.hidden
    if chunks:
        kept += (len(chunks) + context_levels) * hidden  # inputs
        kept += FP32 * size.tokens * size.head_dim  # rotary angles
    elif size.nbytes == FP32 and first:
        kept += size.nbytes * (size.tokens - size.shared) * size.hidden  # the first norm keeps its input
    return kept + indices(slots, recompute)


def recomputed(size: Sizes, slots: Slots, recompute: Recompute, layers: int) -> int:
    """Return the bytes of the largest part that the backward pass recomputes and holds at once."""
    if recompute.granularity == "selective":
        return core_attention(size, slots)
    chunks, _ = recompute.chunks(layers)
    return max(chunks, default=0) * layer(size, slots, selective=False)


def output_layer(size: Sizes, chunks: LogitChunks) -> int:
    """Return the bytes kept of the final norm and of ``linear_logprobs``.

    The latter keeps hidden states, labels, four statistics of each, and the logits of the last chunk.
    """
    kept = norm(size.shared, size.hidden, size.nbytes) + size.nbytes * size.tokens * size.hidden
    logits = FP32 * chunks.forward * size.columns if chunks.kept else 0
    # The labels come with the micro-batch; the last two numbers of a token are the results.
    return kept + logits + chunks.tokens * (4 * FP32 + INT64) + size.tokens * (INT64 + 2 * FP32)
