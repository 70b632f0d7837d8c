# SPDX-License-Identifier: Apache-2.0
"""Sizes of the language model on one rank, and the modules that its layers are made of.

Shape letters: S tokens of a rank (its context-parallel share), s the same divided by the tensor-parallel ranks where
sequence parallelism is on, h hidden size, H query heads, G key/value heads, D head dimension, F MLP features (H, G and
F of this tensor-parallel rank), e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_g2rpo import models
from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.weights.rules import padded_rows

FP32, INT64 = torch.float32.itemsize, torch.int64.itemsize
LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What the language layers are made of, as ``policy.kernels`` chooses it on the machine that the recipe is for.

    Attributes:
        layers: ``local`` or ``transformer_engine``.
        attention: core attention, named alike.
        fp8: the recipe's ``fp8_recipe`` where linears compute in FP8; None otherwise.
        fused_rope: whether one kernel rotates queries and keys.
        head_norms: whether queries and keys are normalised.
    """

    layers: str = LOCAL
    attention: str = LOCAL
    fp8: str | None = None
    fused_rope: bool = False
    head_norms: bool = True


def modules_of(recipe: Recipe, hf_config: Any) -> Modules:
    """Return the modules of a model's layers on a recipe's machines, GPUs unless ``cluster.device`` is ``cpu``."""
    options = recipe.policy.megatron_cfg
    automatic = LOCAL if recipe.cluster.device == "cpu" else TRANSFORMER_ENGINE
    layers, attention = (
        automatic if asked == "auto" else asked for asked in (options.transformer_impl, options.core_attention)
    )
    return Modules(
        layers=layers,
        attention=attention,
        fp8=options.fp8_cfg.fp8_recipe if options.fp8_cfg.enabled and layers == TRANSFORMER_ENGINE else None,
        fused_rope=options.apply_rope_fusion,
        head_norms=bool(models.family(hf_config.model_type).config(hf_config).get("qk_layernorm")),
    )


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
        modules: what the layers are made of.
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
    modules: Modules


def sizes(text: Any, layout: Layout, row_tokens: int, nbytes: int, modules: Modules) -> Sizes:
    """Return the language model's sizes on one rank.

    Args:
        text: transformers' configuration of the language model.
        layout: the parallel sizes.
        row_tokens: number of tokens of the whole packed row.
        nbytes: bytes of an activation's element.
        modules: what the layers are made of.
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
        modules=modules,
    )
