# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that autograd keeps of the language layers between a micro-batch's forward and backward pass.

The module follows the local layers (``policy.layer_spec``, ``policy.norm``, ``policy.attention``, and megatron-core's
parallel linears, rotary embedding and gated MLP): which tensors each operation saves for its gradient, each storage
once.
docs/plan.md derives every line. Layers of Transformer Engine's modules are in ``plan.transformer_engine``. The letters
are those of ``plan.sizes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.plan import transformer_engine
from megatron_g2rpo.plan.sizes import FP32, INT64, LOCAL, Sizes
from megatron_g2rpo.plan.slots import Slots
from megatron_g2rpo.policy.layouts.logit_chunks import LogitChunks


def norm(rows: int, width: int, nbytes: int) -> int:
    """Return the bytes that ``policy.norm.RMSNorm`` keeps of a ``[rows, width]`` matrix.

    It keeps its input, which nothing else may keep alive, and the reciprocal root of each matrix row.
    """
    return rows * (width * nbytes + FP32)


def layer(size: Sizes, slots: Slots, *, selective: bool) -> int:
    """Return the bytes that autograd keeps of one layer.

    Args:
        size: the rank's sizes of the language model.
        slots: sizes of the core attention's padded batches.
        selective: whether the core attention is recomputed.
    """
    if size.modules.layers == LOCAL:
        return attention(size, slots, selective=selective) + mlp(size)
    if size.modules.attention == LOCAL and not selective:
        core = core_attention(size, slots)
    else:
        core = transformer_engine.core_attention(size, slots, selective=selective)
    return transformer_engine.attention(size, core) + transformer_engine.mlp(size)


def attention(size: Sizes, slots: Slots, *, selective: bool) -> int:
    """Return the bytes kept of input norm, projections, query and key norms, rotary embedding and core attention."""
    e, head = size.nbytes, size.head_dim
    kept = norm(size.shared, size.hidden, e)
    kept += e * size.shared * size.hidden  # input of the query/key/value projection
    if size.modules.head_norms:
        kept += norm(size.tokens * size.heads, head, e) + norm(size.tokens * size.groups, head, e)
    if size.modules.attention != LOCAL:
        kept += 4 * e * size.tokens * head  # cosines and sines, made once for queries and once for keys
        core = transformer_engine.core_attention(size, slots, selective=selective)
        return kept + core + e * size.tokens * size.heads * head  # its output is the output projection's input
    projection = e * size.tokens * size.projected * head
    queries = e * size.tokens * head * size.heads
    is_view = size.heads == size.groups or size.groups == 1  # no copy regroups the heads of the queries
    if size.modules.head_norms:
        # Key norms keep a view, and with it the whole projection; query norms too, if theirs is one.
        kept += projection - e * size.tokens * head * size.groups - (queries if is_view else 0)
    if selective:
        # Queries and keys; the values, and without norms keys and perhaps queries, are views of the projection.
        normalised = e * size.tokens * (size.heads + size.groups) * head
        kept += normalised if size.modules.head_norms else projection + (0 if is_view else queries)
    else:
        kept += core_attention(size, slots)
    return kept + e * size.tokens * size.heads * head  # input of the output projection


def core_attention(size: Sizes, slots: Slots) -> int:
    """Return the bytes kept of the local core attention.

    ``scaled_dot_product_attention`` keeps padded queries, keys, values and outputs, log-sum-exps and masks.
    ``index_copy``, which puts the outputs back into the packed row, keeps the outputs once more, and their places.
    """
    e, width, of_keys = size.nbytes, size.heads * size.head_dim, size.groups * size.head_dim
    kept = 2 * e * (width * slots.queries + of_keys * slots.keys) + FP32 * size.heads * slots.queries + e * slots.mask
    return kept + slots.tokens * (e * width + INT64)


def mlp(size: Sizes) -> int:
    """Return the bytes kept of the MLP and the norm before it.

    The gated MLP keeps gate and up projection, and the product (``policy.swiglu``, or the compiled kernel).
    """
    kept = norm(size.shared, size.hidden, size.nbytes) + size.nbytes * size.shared * size.hidden
    return kept + size.nbytes * size.tokens * 3 * size.features


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
    """Return the bytes of the packed row's index tensors and masks, which all layers share.

    What is recomputed needs each token's place a second time, and the masks, of one byte an element, of which attention
    keeps copies of its own otherwise.
    """
    places = INT64 * (slots.queries + slots.keys + slots.tokens)
    return places if recompute.granularity is None else places + INT64 * slots.tokens + slots.mask


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
        if size.modules.attention != LOCAL:
            kept += FP32 * size.tokens * size.head_dim  # rotary angles
    elif first:
        kept += size.nbytes * (size.tokens - size.shared) * size.hidden
    if size.modules.attention == LOCAL:
        kept += 2 * size.nbytes * size.tokens * size.head_dim  # cosines and sines, which all layers share
    return kept + (indices(slots, recompute) if slots.copied else 0)


def recomputed(size: Sizes, slots: Slots, recompute: Recompute, layers: int) -> int:
    """Return the bytes of the largest part that the backward pass recomputes and holds at once."""
    if recompute.granularity == "selective":
        local = size.modules.attention == LOCAL
        if local:
            return core_attention(size, slots)
        return transformer_engine.core_attention(size, slots, selective=False)
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
