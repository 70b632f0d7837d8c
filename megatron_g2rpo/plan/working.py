# SPDX-License-Identifier: Apache-2.0
"""Working memory: an upper bound of what a pass or an optimizer step holds beside what is kept."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.plan import activations, transformer_engine, vision
from megatron_g2rpo.plan.buffers import DataParallelism, ModelState
from megatron_g2rpo.plan.kept import (
    context_levels,
    element_bytes,
    logit_chunks,
    patches_of,
    recompute_of,
    sizes_of,
    slots_of,
)
from megatron_g2rpo.plan.model import Parameter
from megatron_g2rpo.plan.rows import Row
from megatron_g2rpo.plan.sizes import FP32, INT64, LOCAL, Sizes
from megatron_g2rpo.plan.slots import Slots
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.policy.layouts.logit_chunks import TILE_BYTES, LogitChunks
from megatron_g2rpo.recipe import Recipe


def update_working(recipe: Recipe, hf_config: Any, layout: Layout, row: Row, stage: int) -> int:
    """Return an upper bound of the bytes that a forward or backward pass holds beside what autograd keeps.

    The arguments are those of ``kept_of_row``.
    """
    nbytes, text = element_bytes(recipe), hf_config.get_text_config()
    size = sizes_of(recipe, hf_config, layout, row)
    slots = slots_of(size, row, layout)
    layers = layout.stage_layers(text.num_hidden_layers)[stage]
    moments = [_layer_working(size, slots) + activations.recomputed(size, slots, recompute_of(recipe), layers)]
    if stage == layout.pipeline - 1:
        moments.append(_output_working(size, logit_chunks(recipe, layout, row), recipe.policy.generation.top_k))
    if stage == 0:
        moments.append(_vision_working(recipe, hf_config, layout, row))
    # The deepstack features travel through the first stage's forward pass, kept or not. Layers that are recomputed
    # whole return a gradient of all of them each, which is added to that of the layers behind.
    times = 3 if recipe.policy.megatron_cfg.recompute_granularity == "full" else 1
    levels = context_levels(hf_config, row, stage) * nbytes * size.shared * size.hidden
    return max(moments) + workspace(size) + times * levels


def workspace(size: Sizes) -> int:
    """Return the bytes that Transformer Engine hands to cuBLAS for its matrix products, once a process."""
    return 0 if size.modules.layers == LOCAL else transformer_engine.CUBLAS_WORKSPACE


def _layer_working(size: Sizes, slots: Slots) -> int:
    """Return the most bytes that a layer's backward pass holds (norm, MLP or attention), and a weight's gradient."""
    e, heads = size.nbytes, size.heads * size.head_dim
    norm = size.shared * size.hidden * (3 * FP32 if e == FP32 else 4 * FP32)
    # The gradient of the activation, and of both projections, beside the activated gate.
    mlp = 4 * e * size.tokens * size.features + e * size.shared * size.hidden
    if size.modules.fp8 is not None:
        mlp += 2 * 2 * size.tokens * size.features  # the gradient of both projections, quantised along both directions
    # Gradients of queries, keys and values as the core attention lays them out; of its output, and of the residual.
    of_keys = size.groups * size.head_dim
    attention = FP32 * (heads * max(size.tokens, slots.queries) + 2 * of_keys * max(size.tokens, slots.keys))
    attention += 2 * e * size.shared * size.hidden
    return max(norm, mlp, attention) + 2 * e * size.features * size.hidden


def _output_working(size: Sizes, chunks: LogitChunks, kept_tokens: int | None) -> int:
    """Return the bytes that ``linear_logprobs`` holds at most.

    They are a chunk's logits, in float32 and in the model's dtype, and the gradients of hidden states and weight. Where
    tokens were sampled from some of the vocabulary (``top_k``), a tile of logits has a mask of one byte each, and the
    kept ones' columns.
    """
    e, copies = size.nbytes, 0 if size.nbytes == FP32 else 2
    logits = chunks.forward * size.columns
    # Of several chunks, the last one's tile is still there when the next one's is made.
    tiles = min(TILE_BYTES, FP32 * logits) * (2 if chunks.tokens > chunks.forward else 1)
    forward = logits * ((0 if chunks.kept else FP32) + (e if copies else 0)) + tiles
    logits = chunks.backward * size.columns
    tiles = min(TILE_BYTES, FP32 * logits) * (2 if chunks.tokens > chunks.backward else 1)
    backward = logits * (FP32 + copies * e) + tiles
    backward += chunks.tokens * size.hidden * (FP32 + 2 * e) + e * size.tokens * size.hidden
    mask = 0 if kept_tokens is None else TILE_BYTES // FP32 + 2 * INT64 * kept_tokens * chunks.forward
    return max(forward, backward + e * size.columns * size.hidden) + mask


def _vision_working(recipe: Recipe, hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the most bytes that the vision tower holds, or the gathered features before tokens choose theirs."""
    if not row.images:
        return 0
    options, nbytes = recipe.policy.megatron_cfg, element_bytes(recipe)
    tower, peers, patches = hf_config.vision_config, layout.tensor * layout.context, patches_of(hf_config, layout, row)
    moment = patches * max(6 * FP32 * tower.hidden_size, 3 * nbytes * tower.intermediate_size)
    if options.recompute_granularity == "full" and not options.freeze_vision:
        moment += vision.vision_of(hf_config).block_bytes(hf_config, patches, nbytes)
    geometry = vision.geometry_of(hf_config)
    return max(moment, vision.features(geometry, patches * peers // geometry.merge**2, nbytes))


def optimizer_working(
    parameters: list[Parameter], state: ModelState, parallelism: DataParallelism, layout: Layout
) -> int:
    """Return the bytes that an optimizer step holds beside its state.

    Adam on lists of tensors makes a float32 tensor for each. Before it, gradients of the vision tower are averaged over
    tensor-parallel ranks, in one flat copy.
    """
    averaged = sum(p.numel for p in parameters if p.is_vision and p.trains) if layout.tensor > 1 else 0
    return max(FP32 * state.updated, parallelism.grad_bytes * averaged)
