# SPDX-License-Identifier: Apache-2.0
"""Memory of the embedded rollout engine (``rollout.transformers.engine``), of which every process runs a whole one."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.plan import vision
from megatron_g2rpo.plan.activations import FP32

_FLOAT64 = 8


def cache(text: Any, sequences: int, tokens: int, nbytes: int) -> int:
    """Return the bytes of the key/value cache of a full batch.

    It holds keys and values of all layers, and those of one layer twice while it grows.

    Args:
        text: the model's ``text_config``.
        sequences: number of sequences of a batch.
        tokens: number of tokens of each sequence.
        nbytes: bytes of an element.
    """
    layer = 2 * text.num_key_value_heads * head_dim(text) * nbytes * sequences * tokens
    return (text.num_hidden_layers + 1) * layer


def working(hf_config: Any, prompts: int, prompt_tokens: int, image_tokens: int, sequences: int, nbytes: int) -> int:
    """Return the bytes that prefill or decoding needs beside the cache, whichever needs more; no gradient is kept.

    Args:
        hf_config: transformers' configuration of the model.
        prompts: number of distinct prompts of a batch, which are prefilled together.
        prompt_tokens: number of tokens of each prompt.
        image_tokens: number of image tokens of each prompt, after merging.
        sequences: number of sequences of a batch.
        nbytes: bytes of an activation's element.
    """
    text, tower, geometry = hf_config.text_config, hf_config.vision_config, vision.geometry_of(hf_config)
    tokens = prompts * prompt_tokens
    # Gate, up and their product; the residual and a norm in float32.
    language = tokens * (3 * nbytes * text.intermediate_size + (2 * nbytes + 3 * FP32) * text.hidden_size)
    merge = geometry.merge**2
    patches = prompts * image_tokens * merge
    # Queries and keys in float32 with their rotated halves, or the MLP; the features go to the language model.
    block = max(8 * FP32 * tower.hidden_size, 2 * nbytes * tower.intermediate_size) + 4 * nbytes * tower.hidden_size
    images = patches * (block + FP32 * geometry.patch_values)
    images += vision.features(geometry, patches // merge, nbytes)
    # Logits; then scores, their exponentials and cumulative sums in float64 (``rollout.transformers.sampling.draw``).
    decoding = sequences * text.vocab_size * (nbytes + 4 * _FLOAT64)
    return max(language, images, decoding)
