# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding by the model's own forward pass, whatever its architecture.

Two public extension points of transformers serve for it: a cache object, which takes each layer's new keys and values,
and an attention function, which then attends to what ``PrefixCache`` has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megatron_g2rpo.rollout.transformers.dense_forward import Deepstack, decoder_of
from megatron_g2rpo.rollout.transformers.prefix_cache import KeysValues, PrefixCache

ATTENTION = "megatron_g2rpo_decode"
# What an attention function may be asked for beside a scale, and what of it leaves plain attention as it is.
_PLAIN = {"softcap": (None,), "sliding_window": (None,), "s_aux": (None,), "dropout": (None, 0.0)}

_active: PrefixCache | None = None


class ModelForward:
    """The forward passes of one model.

    Args:
        model: a transformers model that was built with the attention ``ATTENTION``.
        axes: number of position axes that its forward pass is given: 3 for mRoPE, 1 for text.
    """

    def __init__(self, model: Any, axes: int) -> None:
        self._model = model
        self._axes = axes

    def refresh(self) -> None:
        """Do nothing: the forward pass reads the parameters themselves."""

    def prefill(
        self, embedded: Tensor, positions: Tensor, lengths: Sequence[int], deepstack: Deepstack | None
    ) -> tuple[list[KeysValues], Tensor]:
        """Compute prompts that are padded on the right; see ``DenseForward.prefill``.

        Under a causal mask a prompt never attends to padding that follows it, so there is no mask.
        """
        cache = DynamicCache()
        hidden = decoder_of(self._model)(
            inputs_embeds=embedded,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({} if deepstack is None else _as_qwen3_vl_takes(deepstack)),
        ).last_hidden_state
        layers = [
            (layer.keys.transpose(0, 1), layer.values.transpose(0, 1)) for layer in cast(Sequence[Any], cache.layers)
        ]
        last = torch.tensor(lengths, device=embedded.device) - 1
        return layers, hidden[torch.arange(len(lengths), device=embedded.device), last]

    def step(self, tokens: Tensor, positions: Tensor, cache: PrefixCache) -> Tensor:
        """Append a token to each sequence; see ``DenseForward.step``."""
        positions = positions[:, None]
        with _attending_to(cache):
            output = self._model.model(
                input_ids=tokens[:, None],
                position_ids=positions.expand(self._axes, -1, -1) if self._axes > 1 else positions,
                # Four axes are a mask that is taken as it is: transformers makes none of its own.
                attention_mask=torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=tokens.device),
                past_key_values=_Writer(cache),
                use_cache=True,
            )
        cache.advance()
        return output.last_hidden_state[:, 0]


def _as_qwen3_vl_takes(deepstack: Deepstack) -> dict[str, Any]:
    return {"visual_pos_masks": deepstack.where, "deepstack_visual_embeds": list(deepstack.levels)}


class _Writer(Cache):
    """What a forward pass takes for its cache: new keys and values go to a ``PrefixCache``."""

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, K, 1, D]``; return them, which ``attention`` then leaves alone."""
        self._cache.append(layer_idx, key_states[:, :, 0].transpose(0, 1), value_states[:, :, 0].transpose(0, 1))
        return key_states, value_states


@contextmanager
def _attending_to(cache: PrefixCache) -> Iterator[None]:
    global _active
    _active = cache
    try:
        yield
    finally:
        _active = None


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a layer: transformers' own, but in a decoding step that of ``PrefixCache``.

    Args:
        module: the attention layer.
        query: ``[B, K * R, T, D]``; in a decoding step ``T`` is 1.
        key, value: ``[B, K, T, D]``; in a decoding step they are in the cache already.
        attention_mask: see transformers; a decoding step needs none.

    Raises:
        NotImplementedError: more is asked for than scaled softmax attention.
    """
    for name, plain in _PLAIN.items():
        if kwargs.get(name) not in plain:
            raise NotImplementedError(
                f"{type(module).__name__} attends with {name}={kwargs[name]!r}, which the transformers engine does not "
                "compute: sample with policy.generation.backend: vllm"
            )
    if _active is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, width = query.shape
    scale = kwargs.get("scaling") or width**-0.5
    queries = query.view(batch, key.shape[1], -1, width).transpose(0, 1).contiguous()
    attended = _active.attend(module.layer_idx, queries, scale)
    return attended.transpose(0, 1).reshape(batch, 1, heads, width), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
