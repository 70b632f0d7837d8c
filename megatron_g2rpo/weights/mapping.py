# SPDX-License-Identifier: Apache-2.0
"""The tables of the model families, as data: a family that differs in names alone is a new table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_g2rpo.weights.rules import GateUp, GroupedQKV, Replicated, Split, Vocabulary
from megatron_g2rpo.weights.table import Row, WeightTable

REPLICATED = Replicated()


def qwen3_vl(hf_config: Any) -> WeightTable:
    """Qwen3-VL, dense: a vision tower, kept as it is, before the language model."""
    tower = Row("vision_model.{path}", ("model.visual.{path}",), REPLICATED)
    return _table(hf_config, "model.language_model.", [tower], head_norms=True)


def qwen3(hf_config: Any) -> WeightTable:
    """Qwen3, dense, of text alone."""
    return _table(hf_config, "model.", [], head_norms=True)


def llama(hf_config: Any) -> WeightTable:
    """Llama, of text alone, without biases."""
    return _table(hf_config, "model.", [], head_norms=False)


def _table(hf_config: Any, prefix: str, rows: list[Row], *, head_norms: bool) -> WeightTable:
    """A decoder with grouped-query attention and a gated MLP.

    Args:
        hf_config: transformers' configuration.
        prefix: of the language model's tensors.
        rows: of what else the model has.
        head_norms: whether queries and keys are normalised.
    """
    text = hf_config.get_text_config()
    layer, hf_layer = "language_model.decoder.layers.{layer}.", prefix + "layers.{layer}."
    attention, hf_attention = layer + "self_attention.", hf_layer + "self_attn."
    embedding, output = prefix + "embed_tokens.weight", "lm_head.weight"
    tied = bool(hf_config.tie_word_embeddings)
    vocabulary = Vocabulary(text.vocab_size)
    qkv = GroupedQKV(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    projections = tuple(f"{hf_attention}{part}_proj.weight" for part in ("q", "k", "v"))
    gate_up = (hf_layer + "mlp.gate_proj.weight", hf_layer + "mlp.up_proj.weight")
    input_norm, mlp_norm = (hf_layer + "input_layernorm.weight",), (hf_layer + "post_attention_layernorm.weight",)
    head_rows = [
        Row(attention + f"{part}_layernorm.weight", (hf_attention + f"{part}_norm.weight",), REPLICATED)
        for part in ("q", "k")
    ]
    return WeightTable(
        [
            *rows,
            Row("language_model.embedding.word_embeddings.weight", (embedding,), vocabulary),
            # Under tied weights only a last pipeline stage that is not the first has an output matrix.
            Row("language_model.output_layer.weight", (embedding if tied else output,), vocabulary, copy=tied),
            Row("language_model.decoder.final_layernorm.weight", (prefix + "norm.weight",), REPLICATED),
            Row(layer + "input_layernorm.weight", input_norm, REPLICATED),
            Row(layer + "pre_mlp_layernorm.weight", mlp_norm, REPLICATED),
            # Transformer Engine's linears hold the norm before them.
            Row(attention + "linear_qkv.layer_norm_weight", input_norm, REPLICATED),
            Row(layer + "mlp.linear_fc1.layer_norm_weight", mlp_norm, REPLICATED),
            Row(attention + "linear_qkv.weight", projections, qkv),
            Row(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), Split(1)),
            *(head_rows if head_norms else []),
            Row(layer + "mlp.linear_fc1.weight", gate_up, GateUp()),
            Row(layer + "mlp.linear_fc2.weight", (hf_layer + "mlp.down_proj.weight",), Split(1)),
        ],
        ignored=[output] if tied else [],  # a tied checkpoint may store the embedding twice
    )


TABLES: dict[str, Callable[[Any], WeightTable]] = {"qwen3_vl": qwen3_vl, "qwen3": qwen3, "llama": llama}


def table_for(hf_config: Any) -> WeightTable:
    """The table of a model family.

    Raises:
        KeyError: the family has none.
    """
    if hf_config.model_type not in TABLES:
        raise KeyError(f"no weight table for model type {hf_config.model_type!r}; known: {sorted(TABLES)}")
    return TABLES[hf_config.model_type](hf_config)
