# SPDX-License-Identifier: Apache-2.0
"""The one table of parameter names: Megatron's, Hugging Face's, and the shard rule between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.weights.rules import GateUp, GroupedQKV, Replicated, ShardRule, Split, Vocabulary


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: the Hugging Face tensors it holds and how it is sharded."""

    hf_names: tuple[str, ...]
    rule: ShardRule


@dataclass(frozen=True)
class Row:
    """A line of a table: a regular expression of Megatron names, and the Hugging Face names its groups expand to."""

    megatron: str
    hf: tuple[str, ...]
    rule: ShardRule


class UnmappedParameter(KeyError):
    """A Megatron parameter that the table does not know."""


class WeightTable:
    """Looks up parameters of one model family.

    Args:
        rows: the table; the first row that matches the whole name is taken.
    """

    def __init__(self, rows: list[Row]) -> None:
        self._rows = [(re.compile(row.megatron), row) for row in rows]

    def entry(self, megatron_name: str, layer_offset: int = 0) -> Entry:
        """The entry of one parameter.

        Args:
            megatron_name: as in ``named_parameters()`` of the unwrapped model; layer numbers count from this pipeline
                stage's first layer.
            layer_offset: layers on earlier stages.

        Raises:
            UnmappedParameter: no row matches.
        """
        name = _with_offset(megatron_name, layer_offset)
        for pattern, row in self._rows:
            match = pattern.fullmatch(name)
            if match:
                return Entry(tuple(match.expand(hf) for hf in row.hf), row.rule)
        raise UnmappedParameter(f"no row of the weight table matches the Megatron parameter {megatron_name!r}")


def _with_offset(name: str, offset: int) -> str:
    return re.sub(r"(decoder\.layers\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) + offset}", name) if offset else name


def qwen3_vl(hf_config: Any) -> WeightTable:
    """Qwen3-VL, dense."""
    text = hf_config.text_config
    layer, hf_layer = r"language_model\.decoder\.layers\.(\d+)\.", r"model.language_model.layers.\1."
    attention, hf_attention = layer + r"self_attention\.", hf_layer + "self_attn."
    vocabulary = Vocabulary(text.vocab_size)
    qkv = GroupedQKV(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    one = Replicated()
    return WeightTable(
        [
            Row(r"vision_model\.(.+)", (r"model.visual.\1",), one),
            Row(
                r"language_model\.embedding\.word_embeddings\.weight",
                ("model.language_model.embed_tokens.weight",),
                vocabulary,
            ),
            Row(r"language_model\.output_layer\.weight", ("lm_head.weight",), vocabulary),
            Row(r"language_model\.decoder\.final_layernorm\.weight", ("model.language_model.norm.weight",), one),
            Row(layer + r"input_layernorm\.weight", (hf_layer + "input_layernorm.weight",), one),
            Row(layer + r"pre_mlp_layernorm\.weight", (hf_layer + "post_attention_layernorm.weight",), one),
            Row(
                attention + r"linear_qkv\.weight",
                tuple(f"{hf_attention}{part}_proj.weight" for part in ("q", "k", "v")),
                qkv,
            ),
            Row(attention + r"linear_proj\.weight", (hf_attention + "o_proj.weight",), Split(1)),
            Row(attention + r"q_layernorm\.weight", (hf_attention + "q_norm.weight",), one),
            Row(attention + r"k_layernorm\.weight", (hf_attention + "k_norm.weight",), one),
            Row(
                layer + r"mlp\.linear_fc1\.weight",
                (hf_layer + "mlp.gate_proj.weight", hf_layer + "mlp.up_proj.weight"),
                GateUp(),
            ),
            Row(layer + r"mlp\.linear_fc2\.weight", (hf_layer + "mlp.down_proj.weight",), Split(1)),
        ]
    )


TABLES: dict[str, Callable[[Any], WeightTable]] = {"qwen3_vl": qwen3_vl}


def table_for(hf_config: Any) -> WeightTable:
    """The table of a model family.

    Raises:
        KeyError: the family has none.
    """
    if hf_config.model_type not in TABLES:
        raise KeyError(f"no weight table for model type {hf_config.model_type!r}; known: {sorted(TABLES)}")
    return TABLES[hf_config.model_type](hf_config)
