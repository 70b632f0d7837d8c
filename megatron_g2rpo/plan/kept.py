# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of one packed row, on one rank: the language layers, the vision tower and the output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.plan import activations, vision
from megatron_g2rpo.plan.activations import Recompute
from megatron_g2rpo.plan.buffers import DataParallelism
from megatron_g2rpo.plan.rows import Row
from megatron_g2rpo.plan.sizes import FP32, INT64, LOCAL, Sizes, modules_of, sizes
from megatron_g2rpo.plan.slots import Slots, widest_slots
from megatron_g2rpo.policy.layouts.image_shares import largest_share
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.policy.layouts.logit_chunks import LogitChunks
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.types import DTYPES


def element_bytes(recipe: Recipe) -> int:
    """Return the bytes of one element of a weight or an activation."""
    return DTYPES[recipe.policy.precision].itemsize


def data_parallelism(recipe: Recipe, layout: Layout) -> DataParallelism:
    """Return the data-parallel sizes and buffer options that the recipe sets."""
    options, nbytes = recipe.policy.megatron_cfg.distributed_data_parallel_config, element_bytes(recipe)
    return DataParallelism(
        size=recipe.data_parallel_size * layout.context,
        data=recipe.data_parallel_size,
        distributed_optimizer=options.use_distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        grad_bytes=FP32 if options.grad_reduce_in_fp32 else nbytes,
    )


def recompute_of(recipe: Recipe) -> Recompute:
    """Return what the recipe recomputes in the backward pass."""
    options = recipe.policy.megatron_cfg
    return Recompute(options.recompute_granularity, options.recompute_method, options.recompute_num_layers)


def sizes_of(recipe: Recipe, hf_config: Any, layout: Layout, row: Row) -> Sizes:
    """Return the sizes of the language model on a rank that holds its share of a row."""
    return sizes(hf_config.get_text_config(), layout, row.tokens, element_bytes(recipe), modules_of(recipe, hf_config))


def slots_of(size: Sizes, row: Row, layout: Layout) -> Slots:
    """Return the sizes of what the core attention makes of a row, on the rank that has the most."""
    return widest_slots(row, layout.context, local=size.modules.attention == LOCAL)


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of one micro-batch, on one rank of a stage.

    Attributes:
        layers: bytes kept of the language layers.
        vision: bytes kept of the embedding, the merged features and the rank's share of the vision tower.
        output: bytes kept of the output layer.
    """

    layers: int
    vision: int
    output: int

    @property
    def total(self) -> int:
        """Bytes kept of the whole stage."""
        return self.layers + self.vision + self.output


def kept_of_row(recipe: Recipe, hf_config: Any, layout: Layout, row: Row, stage: int) -> Kept:
    """Return the bytes that autograd keeps of a packed row, on the rank of a stage that keeps the most.

    Args:
        recipe: the recipe, of which precision, recomputation and frozen parts are read.
        hf_config: transformers' configuration of the model.
        layout: the parallel sizes.
        row: the whole packed row.
        stage: number of the pipeline stage.
    """
    size = sizes_of(recipe, hf_config, layout, row)
    slots = slots_of(size, row, layout)
    layers = layout.stage_layers(hf_config.get_text_config().num_hidden_layers)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    return Kept(
        layers=activations.stage_layers(
            size, slots, recompute_of(recipe), layers, context_levels(hf_config, row, stage), first=first
        ),
        vision=_kept_of_images(recipe, hf_config, layout, row) if first else 0,
        output=_kept_of_output(recipe, size, logit_chunks(recipe, layout, row)) if last else 0,
    )


def logit_chunks(recipe: Recipe, layout: Layout, row: Row) -> LogitChunks:
    """Return how the labels of a row's rank are cut into chunks of logits."""
    # A context-parallel rank may hold the end of every sequence, where the responses are.
    labels = min(row.labels, row.tokens // layout.context)
    return LogitChunks.of(labels, recipe.policy.logprob_chunk_size)


def context_levels(hf_config: Any, row: Row, stage: int) -> int:
    """Return the number of deepstack levels that travel through a stage's layers."""
    return vision.geometry_of(hf_config).levels if stage == 0 and row.images else 0


def _kept_of_output(recipe: Recipe, size: Sizes, chunks: LogitChunks) -> int:
    """Return the bytes kept of the output layer, with the ids that tokens were sampled from where some were left out.

    These come for every token of the row, and are kept once more for the labels, counted from the rank's first column.
    """
    top_k = recipe.policy.generation.top_k
    kept_ids = 0 if top_k is None else INT64 * top_k * (size.tokens + chunks.tokens)
    return activations.output_layer(size, chunks) + kept_ids


def _kept_of_images(recipe: Recipe, hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the bytes that the first stage keeps before its layers.

    These are indices, merged features and the rank's share of the vision tower.
    """
    options, nbytes = recipe.policy.megatron_cfg, element_bytes(recipe)
    kept = INT64 * (row.tokens // layout.context)
    if not row.images:
        return kept
    placeholders = row.placeholders // layout.context
    kept += INT64 * placeholders  # where the embeddings are replaced
    if options.freeze_vision:
        return kept
    kept += vision.merge(vision.geometry_of(hf_config), placeholders, nbytes)
    recompute, patches = options.recompute_granularity == "full", patches_of(hf_config, layout, row)
    return kept + vision.vision_of(hf_config).tower_bytes(hf_config, patches, nbytes, recompute=recompute)


def patches_of(hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the number of patches that the peer with the most encodes."""
    tokens = largest_share(row.images, layout.tensor * layout.context)
    return tokens * vision.geometry_of(hf_config).merge ** 2
