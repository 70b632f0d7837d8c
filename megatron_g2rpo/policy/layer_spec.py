# SPDX-License-Identifier: Apache-2.0
"""The layer spec seam: which modules the transformer layers are made of.

The local layers are megatron-core's own parallel linears with this package's norm and activation, and run on CPUs and
GPUs alike. Those of Transformer Engine normalise inside of the linears, and need a GPU. Either has one of two core
attentions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_g2rpo.policy.attention import PackedCoreAttention, TransformerEngineCoreAttention
from megatron_g2rpo.policy.deepstack import DeepstackLayer
from megatron_g2rpo.policy.kernels import Kernels
from megatron_g2rpo.policy.norm import RMSNorm
from megatron_g2rpo.policy.swiglu import SwiGLU

# Tensors of the local layers that Transformer Engine's linears hold, under the names of the latter: checkpoints have
# one naming. megatron-core's own specs say it the same way.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def core_attention(kernels: Kernels) -> type[nn.Module]:
    """Return the class of the core attention."""
    return TransformerEngineCoreAttention if kernels.attention == "transformer_engine" else PackedCoreAttention


def block_spec(num_layers: int, kernels: Kernels, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's decoder block.

    Args:
        num_layers: number of layers on this stage.
        kernels: the kernels to use, see ``kernels.choose``.
        qk_norm: whether queries and keys are normalised.
    """
    modules = _transformer_engine() if kernels.layers == "transformer_engine" else _LOCAL
    head_norm = modules.norm if qk_norm else IdentityOp
    layer = ModuleSpec(
        module=DeepstackLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.separate_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column,
                    core_attention=core_attention(kernels),  # pyright: ignore[reportArgumentType]
                    linear_proj=modules.row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            # Annotated as a class or spec; megatron-core's own specs pass this function too.
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=modules.separate_norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=modules.column, linear_fc2=modules.row, activation_func=modules.activation
                ),
            ),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=modules.checkpoint_names,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers,
        layer_norm=modules.norm,  # annotated as an instance, but it is built
    )


@dataclass(frozen=True)
class _Modules:
    """What layers are made of.

    Attributes:
        norm: normalisation of heads and of the last hidden state.
        separate_norm: normalisation before a column-parallel linear, where that does not do it itself.
        column, row: column- and row-parallel linear.
        activation: the gated activation of the MLP; megatron-core looks at it where ``use_te_activation_func`` is set.
        checkpoint_names: start of a tensor's name -> start of its name in a checkpoint.
    """

    norm: Any
    separate_norm: Any
    column: Any
    row: Any
    activation: Any
    checkpoint_names: dict[str, str]


_LOCAL = _Modules(RMSNorm, RMSNorm, ColumnParallelLinear, RowParallelLinear, SwiGLU, CHECKPOINT_NAMES)


def _transformer_engine() -> _Modules:
    # Not at the top: megatron-core leaves the names out where Transformer Engine cannot be imported.
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return _Modules(TENorm, IdentityOp, TELayerNormColumnParallelLinear, TERowParallelLinear, None, {})
