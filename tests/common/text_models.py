# SPDX-License-Identifier: Apache-2.0
"""Tiny random text-only models, one of every text-only family that the policy knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.common.tiny_model import randomise

SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 1024}
# Odd vocabularies: tensor parallelism pads them. Llama's head counts are SmolLM2's, which three ranks can share.
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 161},
    ),
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {**SHAPE, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 157},
    ),
    "llama, scaled positions": (
        LlamaConfig,
        LlamaForCausalLM,
        {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 160, "rope_parameters": SCALED},
    ),
}


def make_text_model(directory: Path | None, name: str, *, tied: bool, seed: int = 0) -> Any:
    """Make a float32 model with random parameters, and save it as safetensors unless ``directory`` is None."""
    config_class, model_class, shape = MODELS[name]
    # Token ids that the defaults name lie outside of so small a vocabulary.
    config = config_class(**shape, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).float().eval()
    randomise(model, seed)
    if directory is not None:
        model.save_pretrained(directory)
    return model
