# SPDX-License-Identifier: Apache-2.0
"""Cheap decoding with transformers: a preallocated key/value cache, and attention that repeats no heads.

Both plug into public extension points of transformers (a cache layer class, a registered attention function), and
change no number beyond float noise. Measured on one CPU core (2.6 million parameters, 16 prompts x 8 samples x 32
tokens): ``generate`` 1.5 s, one prefill and an own loop 0.87 s, with the cache 0.71 s, with the attention 0.5 s.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "megatron_g2rpo_decode"


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, in buffers with free space, so that a decoding step writes only its own token.

    Until the first call of ``keep`` it behaves as transformers' growing layer, which suits the single prefill.
    """

    def keep(self, index: Tensor, free_tokens: int) -> None:
        """Keep the sequences ``index`` of the cache, in that order and as often as they occur there.

        Args:
            index: int64 ``[B]``, places in the cache as it is now.
            free_tokens: number of tokens per sequence for which space is allocated beside the cached ones.

        Raises:
            RuntimeError: the cache is empty.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError("the key/value cache is empty: prefill before sequences are kept")
        self._length = self.keys.shape[2]
        self._store = [_moved(self.keys, index, free_tokens), _moved(self.values, index, free_tokens)]
        self.keys, self.values = self._filled()

    def _filled(self) -> tuple[Tensor, Tensor]:
        keys, values = self._store
        return keys[:, :, : self._length], values[:, :, : self._length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, heads, tokens, width]``; return all of them."""
        if not hasattr(self, "_store"):
            return super().update(key_states, value_states, *args, **kwargs)
        start, self._length = self._length, self._length + key_states.shape[2]
        for buffer, new in zip(self._store, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = new
        filled = self.keys, self.values = self._filled()
        return filled


def _moved(old: Tensor, index: Tensor, free_tokens: int) -> Tensor:
    """Copy entries of ``[B, heads, tokens, width]`` to a buffer with uninitialised space for ``free_tokens`` more."""
    _, heads, length, width = old.shape
    new = old.new_empty(len(index), heads, length + free_tokens, width)
    torch.index_select(old, 0, index, out=new[:, :, :length])
    return new


class PreallocatedCache(Cache):
    """A key/value cache whose layers are ``PreallocatedLayer``s.

    Prefill the distinct prompts, ``keep`` one copy per response, and ``keep`` only the unfinished ones later.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PreallocatedLayer)

    def keep(self, index: Tensor, free_tokens: int) -> None:
        """Call ``PreallocatedLayer.keep`` on all layers."""
        for layer in cast(list[PreallocatedLayer], self.layers):
            layer.keep(index, free_tokens)


def decode_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention, for one query token without copying keys and values once per head.

    With one query token, the heads that share a key/value head are a query of that many tokens: no key is repeated,
    and no causal mask is needed. Longer queries go to transformers' own function.

    Args:
        module: the attention layer.
        query: ``[B, heads, T, width]``.
        key, value: ``[B, kv heads, K, width]``.
        attention_mask: ``[B, 1, T, K]``, True where a query may attend to a key; None for plain causal attention.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, width = query.shape
    folded = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(batch, 1, heads, width), None


AttentionInterface.register(ATTENTION, decode_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
