# SPDX-License-Identifier: Apache-2.0
"""Memory of the embedded rollout engine (``rollout.transformers.engine``), which every process runs whole."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.plan import vision
from megatron_g2rpo.plan.activations import FP32

_FLOAT64 = 8


def cache(text: Any, sequences: int, tokens: int, nbytes: int) -> int:
    """Keys and values of all layers for a full batch; one layer's are held twice while the cache grows."""
    layer = 2 * text.num_key_value_heads * head_dim(text) * nbytes * sequences * tokens
    return (text.num_hidden_layers + 1) * layer


def working(hf_config: Any, prompts: int, prompt_tokens: int, image_tokens: int, sequences: int, nbytes: int) -> int:
    """The largest of prefill and decoding, beyond the cache; nothing is kept for a gradient.

    Args:
        hf_config: of the model.
        prompts: distinct ones of a batch, prefilled together.
        prompt_tokens: of each.
        image_tokens: of each, after merging.
        sequences: of a batch.
        nbytes: of an activation's element.
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
