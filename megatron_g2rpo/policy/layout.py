# SPDX-License-Identifier: Apache-2.0
"""Parallel sizes, and what a model can be split into; without megatron-core, so that a launcher can ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_MODEL_TYPES = ("qwen3_vl",)


class LayoutError(ValueError):
    """The model cannot be split as the recipe asks."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; data parallelism takes what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one replica of the model and read the same rows."""
        return self.tensor * self.pipeline * self.context

    def data(self, world_size: int) -> int:
        """Data-parallel size of a world.

        Raises:
            LayoutError: the world is not a multiple of the model-parallel size.
        """
        if world_size % self.model_parallel:
            raise LayoutError(
                f"{world_size} processes cannot be split into model replicas of tensor {self.tensor} x pipeline "
                f"{self.pipeline} x context {self.context} = {self.model_parallel} ranks; change --nproc (or "
                "cluster.*) or policy.megatron_cfg.*_parallel_size"
            )
        return world_size // self.model_parallel


def check_layout(hf_config: Any, layout: Layout) -> None:
    """Refuse a layout that the model cannot be split into, before any process group exists.

    Raises:
        LayoutError: naming the recipe key and the number that does not divide.
    """
    if hf_config.model_type not in SUPPORTED_MODEL_TYPES:
        raise LayoutError(
            f"policy.model_name: model type {hf_config.model_type!r} is not supported; known: {SUPPORTED_MODEL_TYPES}"
        )
    text, key = hf_config.text_config, "policy.megatron_cfg.tensor_model_parallel_size"
    for what, number in (
        ("attention heads", text.num_attention_heads),
        ("key/value heads", text.num_key_value_heads),
        ("MLP features", text.intermediate_size),
    ):
        if number % layout.tensor:
            raise LayoutError(f"{key}={layout.tensor} does not divide the model's {number} {what}")
    if text.rope_parameters.get("rope_type", "default") != "default":
        raise LayoutError(f"rope_type {text.rope_parameters['rope_type']!r} is not supported; known: default")
    if text.hidden_act != "silu" or text.attention_bias:
        raise LayoutError("only Qwen3-VL's own MLP (silu, gated) and bias-free attention are supported")


def layout_of(megatron_cfg: Any) -> Layout:
    """The layout that the recipe's ``policy.megatron_cfg`` names."""
    return Layout(
        tensor=megatron_cfg.tensor_model_parallel_size,
        pipeline=megatron_cfg.pipeline_model_parallel_size,
        context=megatron_cfg.context_parallel_size,
        sequence_parallel=megatron_cfg.sequence_parallel,
    )


def check_model_dir(directory: str | Path, layout: Layout) -> None:
    """``check_layout`` for the model of a Hugging Face directory.

    Raises:
        LayoutError: see ``check_layout``.
        OSError: the directory has no readable config.json.
    """
    from transformers import AutoConfig

    check_layout(AutoConfig.from_pretrained(directory, local_files_only=True), layout)
