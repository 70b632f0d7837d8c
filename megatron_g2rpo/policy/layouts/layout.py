# SPDX-License-Identifier: Apache-2.0
"""Parallel sizes, and what a model can be split into; imports no megatron-core, so that a launcher can ask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_g2rpo import models
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.recipe import MegatronConfig


class LayoutError(ValueError):
    """The model cannot be split as the recipe asks."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the model-parallel groups; data parallelism takes what is left of the world.

    Expert parallelism would be one axis more: a field here (ranks that hold different experts of one layer), a factor
    of ``model_parallel``, and a group in ``policy.process_groups``; ``models.base`` says what else would change.

    Attributes:
        tensor, pipeline, context: number of ranks in a group of each kind.
        sequence_parallel: whether tensor-parallel ranks also split the activations between their regions by tokens.
        first_stage_layers, last_stage_layers: number of layers on the first and on the last pipeline stage; None for an
            equal share.
        token_alignment: number that the tokens of what a rank multiplies must be a multiple of, and the features of
            its weights as well; 1 without FP8, see ``FP8_TOKEN_ALIGNMENT``.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    token_alignment: int = 1

    @property
    def model_parallel(self) -> int:
        """Number of ranks that hold one replica of the model and read the same packed rows."""
        return self.tensor * self.pipeline * self.context

    def data(self, world_size: int) -> int:
        """Return the data-parallel size of a world of ``world_size`` processes.

        Raises:
            LayoutError: ``world_size`` is not a multiple of the model-parallel size.
        """
        if world_size % self.model_parallel:
            raise LayoutError(
                f"{world_size} processes cannot be split into model replicas of tensor {self.tensor} x pipeline "
                f"{self.pipeline} x context {self.context} = {self.model_parallel} ranks; change --nproc (or "
                "cluster.*) or policy.megatron_cfg.*_parallel_size"
            )
        return world_size // self.model_parallel

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of layers on each pipeline stage, as megatron-core distributes them.

        Raises:
            LayoutError: the layers cannot be distributed over the stages as configured.
        """
        fixed = [count for count in (self.first_stage_layers, self.last_stage_layers) if count is not None]
        stages, layers = self.pipeline - len(fixed), num_layers - sum(fixed)
        keys = (
            f"policy.megatron_cfg.num_layers_in_first_pipeline_stage ({self.first_stage_layers}) and "
            f"num_layers_in_last_pipeline_stage ({self.last_stage_layers})"
        )
        if self.pipeline == 1:
            if fixed:
                raise LayoutError(f"{keys} need policy.megatron_cfg.pipeline_model_parallel_size above 1")
            return (num_layers,)
        if min([*fixed, 1]) < 1 or layers < stages or (stages == 0 and layers):
            raise LayoutError(
                f"the model's {num_layers} layers cannot be spread over {self.pipeline} pipeline stages with {keys}"
            )
        if stages and layers % stages:
            raise LayoutError(
                f"policy.megatron_cfg.pipeline_model_parallel_size={self.pipeline}: {layers} layers do not divide over "
                f"{stages} stages; set {keys}"
            )
        middle = [layers // stages] * stages if stages else []
        first = [] if self.first_stage_layers is None else [self.first_stage_layers]
        last = [] if self.last_stage_layers is None else [self.last_stage_layers]
        return (*first, *middle, *last)


# What both dimensions of a matrix must be multiples of to be multiplied in FP8, by megatron-core's ``fp8_recipe``. 16
# elements are what the products need, of features in the forward pass and of tokens in that of a weight's gradient
# (Transformer Engine itself refuses other features, and tokens that are no multiple of 8, before it gathers those of
# sequence parallelism). Beyond that: whole blocks, so that no split of a matrix changes what shares a scale.
FP8_TOKEN_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}


def token_multiples(layout: Layout) -> tuple[int, int]:
    """Return what the lengths of sequences and of rows must be multiples of, in tokens before any split.

    Args:
        layout: the parallel sizes.

    Returns:
        ``(sequence, row)``. A sequence is cut into ``2 * context`` equal chunks (zigzag). What a rank holds of a row
        must then split over tensor-parallel ranks under sequence parallelism, into whole FP8 blocks each.
    """
    sequence = 2 * layout.context if layout.context > 1 else 1
    share = layout.tensor if layout.sequence_parallel else 1
    return sequence, math.lcm(sequence, layout.context * share * layout.token_alignment)


def check_layout(hf_config: Any, layout: Layout) -> None:
    """Refuse a layout that the model cannot be split into, before any process group exists.

    Args:
        hf_config: transformers' configuration of the model.
        layout: the parallel sizes.

    Raises:
        LayoutError: the model does not divide, or is not supported; names the recipe key and the number or the feature.
    """
    try:
        family = models.family(hf_config.model_type)
        family.check(hf_config)
    except ValueError as error:
        raise LayoutError(f"policy.model_name: {error}") from error
    fields, key = family.config(hf_config), "policy.megatron_cfg.tensor_model_parallel_size"
    for what, name in (("attention heads", "num_attention_heads"), ("MLP features", "ffn_hidden_size")):
        if fields[name] % layout.tensor:
            raise LayoutError(f"{key}={layout.tensor} does not divide the model's {fields[name]} {what}")
    # With fewer key/value heads than ranks, ranks share one: megatron-core gathers the projection and picks.
    groups = fields["num_query_groups"]
    if groups % layout.tensor and layout.tensor % groups:
        raise LayoutError(f"{key}={layout.tensor} neither divides nor is a multiple of the {groups} key/value heads")
    if layout.sequence_parallel and layout.tensor == 1:
        raise LayoutError(f"policy.megatron_cfg.sequence_parallel needs {key} above 1")
    _check_features(fields, layout)
    levels = 0 if family.vision is None else family.vision.geometry(hf_config).levels
    first = layout.stage_layers(fields["num_layers"])[0]
    if first < levels:
        raise LayoutError(
            f"the first pipeline stage has {first} layer(s), but the vision tower feeds the first {levels} (deepstack) "
            "and lives there: raise policy.megatron_cfg.num_layers_in_first_pipeline_stage or lower "
            "pipeline_model_parallel_size"
        )


def _check_features(fields: Mapping[str, Any], layout: Layout) -> None:
    """Refuse language linears whose share on a rank cannot be multiplied in FP8."""
    heads, groups, head = (fields[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels"))
    # A rank holds at least one key/value head; with fewer of them than ranks, several ranks hold the same.
    shares = {
        "features of the hidden state": fields["hidden_size"],
        "query features": heads * head // layout.tensor,
        "query, key and value features": (heads // layout.tensor + 2 * max(groups // layout.tensor, 1)) * head,
        "MLP features": fields["ffn_hidden_size"] // layout.tensor,
    }
    for what, size in shares.items():
        if size % layout.token_alignment:
            raise LayoutError(
                f"policy.megatron_cfg.fp8_cfg.fp8_recipe: its blocks need multiples of {layout.token_alignment}, and a "
                f"rank has {size} {what} at tensor_model_parallel_size={layout.tensor}: choose another recipe or "
                "layout, or fp8_cfg.enabled=false"
            )


def check_model(hf_config: Any, megatron_cfg: MegatronConfig) -> None:
    """Refuse what a recipe's ``policy.megatron_cfg`` asks of a model and its layers cannot do.

    Args:
        hf_config: transformers' configuration of the model.
        megatron_cfg: the recipe's ``policy.megatron_cfg``.

    Raises:
        LayoutError: see ``check_layout`` and ``check_recompute``; or too many layers are to stay out of FP8, or all.
    """
    layout = layout_of(megatron_cfg)
    check_layout(hf_config, layout)
    num_layers = hf_config.get_text_config().num_hidden_layers
    check_recompute(layout.stage_layers(num_layers), megatron_cfg)
    if not (megatron_cfg.fp8_cfg.enabled and megatron_cfg.first_last_layers_bf16):
        return
    # megatron-core's rule, whatever the number of layers of the first and the last stage.
    largest = num_layers // layout.pipeline
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(megatron_cfg, key) > largest:
            raise LayoutError(
                f"policy.megatron_cfg.{key}={getattr(megatron_cfg, key)} is more than {largest}, the model's "
                f"{num_layers} layers over pipeline_model_parallel_size={layout.pipeline}"
            )
    start, end = megatron_cfg.num_layers_at_start_in_bf16, megatron_cfg.num_layers_at_end_in_bf16
    if start + end >= num_layers:
        raise LayoutError(
            f"policy.megatron_cfg.num_layers_at_start_in_bf16 ({start}) and num_layers_at_end_in_bf16 ({end}) leave "
            f"none of the model's {num_layers} layers in FP8: lower them, or set fp8_cfg.enabled=false"
        )


def check_recompute(stages: Sequence[int], megatron_cfg: MegatronConfig) -> None:
    """Refuse to recompute chunks of layers that do not divide a stage: megatron-core would run past its last layer.

    Args:
        stages: number of layers on each pipeline stage.
        megatron_cfg: the recipe's ``policy.megatron_cfg``.

    Raises:
        LayoutError: the chunk size does not divide a stage's layers; names the recipe key and the stage.
    """
    chunk = megatron_cfg.recompute_num_layers
    if megatron_cfg.recompute_granularity != "full" or megatron_cfg.recompute_method != "uniform":
        return
    for stage, layers in enumerate(stages):
        if layers % chunk:
            raise LayoutError(
                f"policy.megatron_cfg.recompute_num_layers={chunk} does not divide the {layers} layers of pipeline "
                f"stage {stage}, as recompute_method uniform needs; 1 always does, and block takes any number"
            )


def layout_of(megatron_cfg: MegatronConfig) -> Layout:
    """Return the layout that the recipe's ``policy.megatron_cfg`` names."""
    return Layout(
        tensor=megatron_cfg.tensor_model_parallel_size,
        pipeline=megatron_cfg.pipeline_model_parallel_size,
        context=megatron_cfg.context_parallel_size,
        sequence_parallel=megatron_cfg.sequence_parallel,
        first_stage_layers=megatron_cfg.num_layers_in_first_pipeline_stage,
        last_stage_layers=megatron_cfg.num_layers_in_last_pipeline_stage,
        token_alignment=FP8_TOKEN_ALIGNMENT[megatron_cfg.fp8_cfg.fp8_recipe] if megatron_cfg.fp8_cfg.enabled else 1,
    )


def check_model_dir(directory: str | Path, megatron_cfg: MegatronConfig) -> None:
    """Run ``check_model`` for the model in a Hugging Face directory.

    Raises:
        LayoutError: see ``check_model``; or config.json cannot be read.
        OSError: the directory has no readable config.json.
    """
    try:
        config = load_config(directory)
    except ValueError as error:
        raise LayoutError(f"policy.model_name: {error}") from error
    check_model(config, megatron_cfg)
