# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding of a dense decoder, computed from the parameters of the transformers model with few operations.

For Llama, Qwen3 and Qwen3-VL: pre-norm layers, grouped-query attention, rotary positions, a gated silu MLP, no biases.
At a few sequences a step of transformers' own layers is mostly the cost of its many small operations. Here queries,
keys and values are one product, gate and up another: their parameters become views of one matrix each, so that the
model, whose weights are loaded by name, and this module read the same memory. Of a prompt's tokens the last layer
computes keys and values alone, but for the last token, whose hidden state is all that the output head reads. Numbers
differ by float noise alone.

Shape letters: ``B`` sequences, ``P`` tokens of the longest prompt, ``N`` tokens, ``H`` hidden size, ``K`` key/value
heads, ``R`` query heads that share one, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_g2rpo.rollout.transformers.prefix_cache import KeysValues, PrefixCache

_CLASSES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration")


class Deepstack(NamedTuple):
    """Features of images that are added to hidden states after the first layers.

    Attributes:
        where: bool ``[B, P]``, the tokens of images.
        levels: for each of the first layers ``[F, H]``, in the order of the tokens.
    """

    where: Tensor
    levels: Sequence[Tensor]


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


class DenseForward:
    """The forward passes of one model; see the module.

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

    def prefill(
        self, embedded: Tensor, positions: Tensor, lengths: Sequence[int], deepstack: Deepstack | None
    ) -> tuple[list[KeysValues], Tensor]:
        """Compute prompts that are padded on the right.

        Args:
            embedded: ``[B, P, H]``, embeddings of tokens and features of images.
            positions: int64 ``[B, P]``, or mRoPE's ``[3, B, P]``.
            lengths: number of tokens of each prompt.
            deepstack: what is added to the tokens of images after the first layers.

        Returns:
            Each layer's keys and values, each ``[K, B, P, D]``, and the hidden states ``[B, H]`` at each prompt's last
            token, which the output head reads.
        """
        batch, longest, _ = embedded.shape
        cos, sin = self._angles(embedded, positions)
        last = torch.tensor(
            [longest * row + length - 1 for row, length in enumerate(lengths)], device=embedded.device
        )  # the last tokens' places among all
        hidden, layers = embedded.flatten(0, 1), []
        where = None if deepstack is None else deepstack.where.flatten().nonzero().squeeze(1)
        for number in range(len(self._layers)):
            layer, is_last = self._layers[number], number == len(self._layers) - 1
            normed = F.rms_norm(hidden, hidden.shape[1:], layer.input_norm, self._eps)
            queries, keys, values = self._projected(number, normed, cos, sin, last if is_last else None)
            keys, values = (
                each.view(batch, longest, -1, self._width).permute(2, 0, 1, 3).contiguous() for each in (keys, values)
            )
            layers.append((keys, values))
            attended = F.scaled_dot_product_attention(
                queries.view(batch, -1, self._heads, self._width).transpose(1, 2),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=_until(lengths, longest, keys.device) if is_last else None,
                is_causal=not is_last,
                scale=self._scale,
                enable_gqa=self._heads != self._kv_heads,
            )
            if is_last:
                hidden = hidden[last]
            hidden = self._rest(number, hidden, attended.transpose(1, 2).reshape(len(hidden), -1))
            if deepstack is not None and where is not None and number < len(deepstack.levels):
                if is_last:
                    hidden = hidden + _of_last(deepstack.levels[number].to(hidden.dtype), where, last)
                else:
                    hidden.index_add_(0, where, deepstack.levels[number].to(hidden.dtype))
        return layers, F.rms_norm(hidden, hidden.shape[1:], self._norm, self._eps)

    def step(self, tokens: Tensor, positions: Tensor, cache: PrefixCache) -> Tensor:
        """Append a token to each sequence; return the hidden states that the output head reads, ``[B, H]``.

        Args:
            tokens: int64 ``[B]``.
            positions: int64 ``[B]``, the position of each, the same on all axes.
            cache: keys and values of what came before; changed in place.
        """
        hidden = F.embedding(tokens, self._embedding)
        cos, sin = self._angles(hidden[None], positions[None])
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, hidden.shape[1:], layer.input_norm, self._eps)
            queries, keys, values = self._projected(number, normed, cos, sin)
            cache.append(number, keys.transpose(0, 1), values.transpose(0, 1))
            queries = queries.view(len(tokens), self._kv_heads, -1, self._width).transpose(0, 1)
            attended = cache.attend(number, queries.contiguous(), self._scale)
            hidden = self._rest(number, hidden, attended.transpose(0, 1).reshape(len(tokens), -1))
        cache.advance()
        return F.rms_norm(hidden, hidden.shape[1:], self._norm, self._eps)

    def _angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[N, 1, D]``; the sine's first half is negated, see ``_turned``."""
        cos, sin = self._rotary(like, positions)
        sin = torch.cat([-sin[..., : self._width // 2], sin[..., self._width // 2 :]], dim=-1)
        return cos.reshape(-1, 1, self._width), sin.reshape(-1, 1, self._width)

    def _projected(
        self, number: int, normed: Tensor, cos: Tensor, sin: Tensor, asking: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[N, K * R, D]``, and keys and values ``[N, K, D]``, the first two rotated.

        Args:
            number: number of the layer.
            normed: ``[N, H]``, the layer's normalised input.
            cos, sin: see ``_angles``.
            asking: int64, the tokens whose queries are wanted; None: all.
        """
        heads, kv_heads, width = self._heads, self._kv_heads, self._width
        matrix, norms = self._layers[number].qkv, self._head_norms[number]
        if asking is None:
            qkv = F.linear(normed, matrix).view(len(normed), -1, width)
            turned = self._turned(qkv[:, : heads + kv_heads], norms, cos, sin)
            return turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]
        queries = F.linear(normed[asking], matrix[: heads * width]).view(len(asking), -1, width)
        queries = self._turned(queries, None if norms is None else norms[:heads], cos[asking], sin[asking])
        both = F.linear(normed, matrix[heads * width :]).view(len(normed), -1, width)
        keys = self._turned(both[:, :kv_heads], None if norms is None else norms[heads:], cos, sin)
        return queries, keys, both[:, kv_heads:]

    def _turned(self, heads: Tensor, norms: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalise heads ``[N, heads, D]``, if the model does, and rotate them to their positions."""
        if norms is not None:
            heads = F.rms_norm(heads, heads.shape[2:], None, self._eps).mul_(norms)
        # Of a rotation by halves, (a, b) -> (a cos - b sin, b cos + a sin): the halves change places.
        swapped = torch.cat([heads[..., self._width // 2 :], heads[..., : self._width // 2]], dim=-1)
        return torch.addcmul(heads * cos, swapped, sin)

    def _rest(self, number: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return a layer's output ``[N, H]`` of its input and its attention's output ``[N, K * R * D]``."""
        layer = self._layers[number]
        hidden = torch.addmm(hidden, attended, layer.output.t())
        normed = F.rms_norm(hidden, hidden.shape[1:], layer.mlp_norm, self._eps)
        gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return torch.addmm(hidden, F.silu(gate).mul_(up), layer.down.t())


def _until(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """Return what the last token of each prompt attends to, bool ``[B, 1, 1, P]``; None where that is everything."""
    if set(lengths) == {longest}:
        return None
    ends = torch.tensor(lengths, device=device)[:, None]
    return (torch.arange(longest, device=device) < ends)[:, None, None]


def _of_last(level: Tensor, where: Tensor, last: Tensor) -> Tensor:
    """Return the rows of a deepstack level ``[F, H]`` that belong at the tokens ``last``, zeros elsewhere."""
    found = where[:, None] == last
    return found.T.to(level.dtype) @ level


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
