# SPDX-License-Identifier: Apache-2.0
"""The layer spec seam: which modules the transformer layers are made of.

This version has the local layers (megatron-core's own parallel linears, this package's norm), which run on CPUs and
GPUs alike, with one of two core attentions.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_g2rpo.policy.attention import PackedCoreAttention, TransformerEngineCoreAttention
from megatron_g2rpo.policy.deepstack import DeepstackLayer
from megatron_g2rpo.policy.device import Device, DeviceError, optional_packages
from megatron_g2rpo.policy.norm import RMSNorm


def core_attention(name: str, device: Device) -> type[torch.nn.Module]:
    """Return the module class that the recipe's ``policy.megatron_cfg.core_attention`` names.

    Args:
        name: ``local``, ``transformer_engine``, or ``auto``: Transformer Engine's on a GPU, the local one on a CPU.
        device: this rank's device.

    Raises:
        DeviceError: Transformer Engine's attention was asked for and cannot run; ``auto`` on a GPU asks for it too,
            because there is no silent fallback.
    """
    if name == "local" or (name == "auto" and device.kind == "cpu"):
        return PackedCoreAttention
    if device.kind == "cpu":
        raise DeviceError("policy.megatron_cfg.core_attention=transformer_engine needs a GPU; set auto or local")
    if not optional_packages()["transformer_engine"]:
        raise DeviceError(
            f"policy.megatron_cfg.core_attention={name} needs Transformer Engine on a GPU, and it is not installed: "
            "install the extra `te`, or set policy.megatron_cfg.core_attention=local"
        )
    return TransformerEngineCoreAttention


def local_block_spec(num_layers: int, attention: type[torch.nn.Module], *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's decoder block.

    Args:
        num_layers: number of layers on this stage.
        attention: the core attention's class, see ``core_attention``.
        qk_norm: whether queries and keys are normalised.
    """
    head_norm = RMSNorm if qk_norm else IdentityOp
    layer = ModuleSpec(
        module=DeepstackLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=attention,  # pyright: ignore[reportArgumentType]
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            # Annotated as a class or spec; megatron-core's own specs pass this function too.
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers,
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]  # annotated as an instance, but it is built
    )
