# SPDX-License-Identifier: Apache-2.0
"""A decoding step of a dense decoder, computed from the parameters of the transformers model with few operations.

For Llama, Qwen3 and Qwen3-VL: pre-norm layers, grouped-query attention, rotary positions, a gated silu MLP, no biases.
At a few sequences a step of transformers' own layers is mostly the cost of its many small operations. Here queries,
keys and values are one product, gate and up another: their parameters become views of one matrix each, so that the
model, whose forward pass prefills, and this step read the same memory. Numbers differ by float noise alone.

Shape letters: ``B`` sequences, ``H`` hidden size, ``K`` key/value heads, ``R`` query heads that share one, ``D`` width
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_g2rpo.rollout.transformers.prefix_cache import PrefixCache

_CLASSES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration")


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's parameters; ``qkv`` and ``gate_up`` hold those of several linears.

    Attributes:
        input_norm, mlp_norm: ``[H]``.
        qkv: ``[(K * R + 2 * K) * D, H]``: the heads of queries, of keys, of values.
        query_norm, key_norm: ``[D]``; None for models that normalise neither.
        output: ``[H, K * R * D]``.
        gate_up: ``[2 * I, H]``.
        down: ``[H, I]``.
    """

    input_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    gate_up: Tensor
    down: Tensor


class DenseStep:
    """The step of one model; see the module.

    Args:
        model: a transformers model for which ``suits`` is true. Its parameters are moved together, see the module.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        decoder = decoder_of(model)
        attention = decoder.layers[0].self_attn
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._width, self._scale = attention.head_dim, attention.scaling
        self._eps = config.rms_norm_eps
        self._rotary = decoder.rotary_emb
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._norm: Tensor = decoder.norm.weight
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._head_norms: list[Tensor | None] = [None] * len(self._layers)

    @staticmethod
    def suits(model: Any) -> bool:
        """Return whether a model's step is computed exactly here; another takes its own forward pass."""
        config = model.config.get_text_config()
        plain = (
            getattr(config, "hidden_act", None) == "silu"
            and not getattr(config, "attention_bias", False)
            and not getattr(config, "mlp_bias", False)
            and not getattr(config, "use_sliding_window", False)
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        )
        return type(model).__name__ in _CLASSES and type(model).__module__.startswith("transformers.models.") and plain

    def refresh(self) -> None:
        """Take note that the model's parameters have new values."""
        heads, kv_heads = self._heads, self._kv_heads
        for number, layer in enumerate(self._layers):
            if layer.query_norm is not None and layer.key_norm is not None:
                norms = [layer.query_norm.expand(heads, -1), layer.key_norm.expand(kv_heads, -1)]
                self._head_norms[number] = torch.cat(norms)

    def __call__(self, tokens: Tensor, positions: Tensor, cache: PrefixCache) -> Tensor:
        """Append a token to each sequence; return the hidden states that the output head reads, ``[B, H]``.

        Args:
            tokens: int64 ``[B]``.
            positions: int64 ``[B]``, the position of each, the same on all axes.
            cache: keys and values of what came before; changed in place.
        """
        hidden = F.embedding(tokens, self._embedding)
        cos, sin = self._angles(hidden, positions)
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, hidden.shape[1:], layer.input_norm, self._eps)
            attended = self._attention(number, F.linear(normed, layer.qkv), cos, sin, cache)
            hidden = torch.addmm(hidden, attended, layer.output.t())
            normed = F.rms_norm(hidden, hidden.shape[1:], layer.mlp_norm, self._eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate).mul_(up), layer.down.t())
        cache.advance()
        return F.rms_norm(hidden, hidden.shape[1:], self._norm, self._eps)

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[B, 1, D]``; the sine's first half is negated, see ``_attention``."""
        cos, sin = self._rotary(hidden[None], positions[None])
        sin = torch.cat([-sin[..., : self._width // 2], sin[..., self._width // 2 :]], dim=-1)
        return cos.view(-1, 1, self._width), sin.view(-1, 1, self._width)

    def _attention(self, number: int, qkv: Tensor, cos: Tensor, sin: Tensor, cache: PrefixCache) -> Tensor:
        """Return the attention's output ``[B, K * R * D]`` of the projections ``[B, (K * R + 2 * K) * D]``."""
        heads, kv_heads, width = self._heads, self._kv_heads, self._width
        qkv = qkv.view(len(qkv), -1, width)
        turned = qkv[:, : heads + kv_heads]
        head_norms = self._head_norms[number]
        if head_norms is not None:
            turned = F.rms_norm(turned, (width,), None, self._eps).mul_(head_norms)
        # Of a rotation by halves, (a, b) -> (a cos - b sin, b cos + a sin): the halves change places.
        swapped = torch.cat([turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
        turned = torch.addcmul(turned * cos, swapped, sin)
        cache.append(number, turned[:, heads:].transpose(0, 1), qkv[:, heads + kv_heads :].transpose(0, 1))
        queries = turned[:, :heads].view(len(qkv), kv_heads, -1, width).transpose(0, 1)
        attended = cache.attend(number, queries.contiguous(), self._scale)
        return attended.transpose(0, 1).reshape(len(qkv), -1)


def decoder_of(model: Any) -> Any:
    """Return the layers of text of a transformers model, vision-language or text-only, with embedding and last norm."""
    return getattr(model.model, "language_model", model.model)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        qkv=_together(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        output=attention.o_proj.weight,
        gate_up=_together(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight,
    )


def _together(*linears: nn.Linear) -> Tensor:
    """Move the weights of linears into one matrix, of which they are views from now on; return the matrix."""
    matrix = torch.cat([linear.weight.data for linear in linears])
    for linear, rows in zip(linears, matrix.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = rows
    return matrix
