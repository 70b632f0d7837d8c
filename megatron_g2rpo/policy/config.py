# SPDX-License-Identifier: Apache-2.0
"""Translates a Hugging Face config and a layout into megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_g2rpo import models
from megatron_g2rpo.policy.fp8 import fp8_fields
from megatron_g2rpo.policy.kernels import Kernels
from megatron_g2rpo.policy.layouts.layout import Layout, check_recompute
from megatron_g2rpo.recipe import MegatronConfig


def transformer_config(
    hf_config: Any, layout: Layout, dtype: torch.dtype, megatron_cfg: MegatronConfig, kernels: Kernels
) -> TransformerConfig:
    """Return the language model's TransformerConfig.

    Args:
        hf_config: transformers' configuration of a registered family; ``Family.config`` translates the model's fields.
        layout: the parallel sizes.
        dtype: dtype of parameters and activations, float32 or bfloat16.
        megatron_cfg: the recipe's ``policy.megatron_cfg``; its recomputation and attention keys are read here.
        kernels: the policy's kernels, see ``kernels.choose``.

    Raises:
        LayoutError: the layers cannot be distributed over the stages, or a stage's layers over chunks to recompute.
    """
    family = models.family(hf_config.model_type)
    full = megatron_cfg.recompute_granularity == "full"
    check_recompute(layout.stage_layers(hf_config.get_text_config().num_hidden_layers), megatron_cfg)
    return TransformerConfig(
        **family.config(hf_config),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Where the model will live: on the CPU every rank would make each matrix whole, in float32, to cut its shard.
        use_cpu_initialization=False,
        # Weights always come from a checkpoint or a weight stream. Not perform_initialization=False: without it
        # megatron-core does not mark sharded parameters, and the gradient norm counts them once too few.
        init_method=_keep,
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        cp_comm_type=megatron_cfg.cp_comm_type,
        recompute_granularity=megatron_cfg.recompute_granularity,
        # Only full recomputation has these; selective recomputes the core attention, megatron-core's default choice.
        recompute_method=megatron_cfg.recompute_method if full else None,
        recompute_num_layers=megatron_cfg.recompute_num_layers if full else None,
        # Sums divided once, by the global token count, in finalize_model_grads.
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        apply_rope_fusion=megatron_cfg.apply_rope_fusion,
        bias_activation_fusion=megatron_cfg.bias_activation_fusion,
        # Not Transformer Engine's: that of the layer spec, which only the local layers' has.
        use_te_activation_func=kernels.layers == "local" and kernels.activation == "torch",
        gradient_accumulation_fusion=megatron_cfg.gradient_accumulation_fusion,
        # There is no dropout, and no softmax outside of the core attention.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **fp8_fields(megatron_cfg),
        persist_layer_norm=False,
    )


def _keep(weight: torch.Tensor) -> torch.Tensor:
    return weight
