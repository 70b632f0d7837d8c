# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face Qwen3-VL config and a layout to megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

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


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary rows held by the tensor-parallel group together: the next multiple of its size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def transformer_config(hf_config: Any, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """The language model's TransformerConfig.

    Args:
        hf_config: a ``Qwen3VLConfig``.
        layout: parallel sizes.
        dtype: parameter and activation dtype, float32 or bfloat16.
    """
    text = hf_config.text_config
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        # Weights always come from a checkpoint or a weight stream. Not perform_initialization=False: without it
        # megatron-core does not mark sharded parameters, and the gradient norm counts them once too few.
        init_method=_keep,
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # Sums divided once, by the global token count, in finalize_model_grads.
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Fusions that need apex or Transformer Engine kernels.
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _keep(weight: torch.Tensor) -> torch.Tensor:
    return weight
