# SPDX-License-Identifier: Apache-2.0
"""The base of dense decoders: pre-norm layers, grouped-query attention, rotary positions and a gated silu MLP."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_g2rpo.models.base import Vision
from megatron_g2rpo.models.positions import text_positions
from megatron_g2rpo.models.rotary import ROPE_TYPES, RotaryAngles, head_dim, inverse_frequencies
from megatron_g2rpo.weights.rules import GateUp, GroupedQKV, Replicated, Split, Vocabulary
from megatron_g2rpo.weights.table import Row, WeightTable


class DenseDecoder:
    """A text-only dense decoder without biases; families override what differs.

    Attributes:
        head_norms: whether queries and keys are normalised.
        prefix: prefix of the names of the language model's tensors in a Hugging Face checkpoint.
        vision: the family's vision, see ``Family``; None for a text-only family.
    """

    head_norms: ClassVar[bool] = False
    prefix: ClassVar[str] = "model."
    vision: Vision | None = None

    def check(self, hf_config: Any) -> None:
        """Refuse a model that these layers would compute wrongly; see ``Family.check``."""
        text = hf_config.get_text_config()
        if text.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"rope_type {text.rope_parameters['rope_type']!r} is not supported; known: {ROPE_TYPES}")
        if text.hidden_act != "silu" or getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False):
            raise ValueError("only gated MLPs with silu, and layers without biases, are supported")
        if getattr(text, "use_sliding_window", False):
            raise ValueError("sliding-window attention is not supported")

    def config(self, hf_config: Any) -> dict[str, Any]:
        """Return the fields of ``TransformerConfig`` that follow from the model; see ``Family.config``."""
        text = hf_config.get_text_config()
        return {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": head_dim(text),
            "normalization": "RMSNorm",
            "layernorm_epsilon": text.rms_norm_eps,
            "qk_layernorm": self.head_norms,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": False,
        }

    def weights(self, hf_config: Any) -> WeightTable:
        """Return the weight table of ``rows``; see ``Family.weights``."""
        # A tied checkpoint may store the embedding twice.
        return WeightTable(self.rows(hf_config), ignored=["lm_head.weight"] if hf_config.tie_word_embeddings else [])

    def rows(self, hf_config: Any) -> list[Row]:
        """Return the rows of the weight table for the language model.

        The code writes Hugging Face names as those of a text-only model, which begin with ``model.``; ``prefix`` takes
        that place.
        """
        text = hf_config.get_text_config()
        tied = bool(hf_config.tie_word_embeddings)
        vocabulary = Vocabulary(text.vocab_size)
        return [
            self._row("language_model.embedding.word_embeddings.weight", "model.embed_tokens.weight", rule=vocabulary),
            # Under tied weights only a last pipeline stage that is not the first has an output matrix.
            self._row(
                "language_model.output_layer.weight",
                "model.embed_tokens.weight" if tied else "lm_head.weight",
                rule=vocabulary,
                copy=tied,
            ),
            self._row("language_model.decoder.final_layernorm.weight", "model.norm.weight"),
            self._row(
                "language_model.decoder.layers.{layer}.input_layernorm.weight",
                "model.layers.{layer}.input_layernorm.weight",
            ),
            self._row(
                "language_model.decoder.layers.{layer}.pre_mlp_layernorm.weight",
                "model.layers.{layer}.post_attention_layernorm.weight",
            ),
            # Transformer Engine's linears hold the norm before them.
            self._row(
                "language_model.decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
                "model.layers.{layer}.input_layernorm.weight",
            ),
            self._row(
                "language_model.decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
                "model.layers.{layer}.post_attention_layernorm.weight",
            ),
            self._row(
                "language_model.decoder.layers.{layer}.self_attention.linear_qkv.weight",
                "model.layers.{layer}.self_attn.q_proj.weight",
                "model.layers.{layer}.self_attn.k_proj.weight",
                "model.layers.{layer}.self_attn.v_proj.weight",
                rule=GroupedQKV(text.num_attention_heads, text.num_key_value_heads, head_dim(text)),
            ),
            self._row(
                "language_model.decoder.layers.{layer}.self_attention.linear_proj.weight",
                "model.layers.{layer}.self_attn.o_proj.weight",
                rule=Split(1),
            ),
            *(self._head_norm_rows() if self.head_norms else []),
            self._row(
                "language_model.decoder.layers.{layer}.mlp.linear_fc1.weight",
                "model.layers.{layer}.mlp.gate_proj.weight",
                "model.layers.{layer}.mlp.up_proj.weight",
                rule=GateUp(),
            ),
            self._row(
                "language_model.decoder.layers.{layer}.mlp.linear_fc2.weight",
                "model.layers.{layer}.mlp.down_proj.weight",
                rule=Split(1),
            ),
        ]

    def _head_norm_rows(self) -> list[Row]:
        return [
            self._row(
                "language_model.decoder.layers.{layer}.self_attention.q_layernorm.weight",
                "model.layers.{layer}.self_attn.q_norm.weight",
            ),
            self._row(
                "language_model.decoder.layers.{layer}.self_attention.k_layernorm.weight",
                "model.layers.{layer}.self_attn.k_norm.weight",
            ),
        ]

    def _row(self, megatron: str, *hf: str, rule: Any = Replicated(), copy: bool = False) -> Row:  # noqa: B008 (frozen)
        names = [self.prefix + name.removeprefix("model.") if name.startswith("model.") else name for name in hf]
        return Row(megatron, tuple(names), rule, copy)

    def angles(self, hf_config: Any) -> nn.Module:
        """Return the rotary angles of the first position axis; see ``Family.angles``."""
        frequencies = inverse_frequencies(hf_config.get_text_config())
        return RotaryAngles(frequencies, [0] * len(frequencies))

    def positions(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """Return positions that count the tokens; see ``Positions``."""
        if len(image_grid_thw):
            raise ValueError(f"{len(image_grid_thw)} images for a text-only model")
        return text_positions(len(token_ids))
