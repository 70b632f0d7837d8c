# SPDX-License-Identifier: Apache-2.0
"""Memory of the rollout engine in the training processes.

Every process runs a whole embedded engine (``rollout.transformers.engine``), whose tensors are counted. vLLM
(``rollout.vllm.engine``) takes the share of a GPU that the recipe gives it and fills it with its cache, so its share is
counted, and checked to hold the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.plan import vision
from megatron_g2rpo.plan.sizes import FP32
from megatron_g2rpo.recipe import Policy

_FLOAT64 = 8
# Assumed, not measured: what vLLM's sleep does not free, its captured CUDA graphs.
ASLEEP = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Memory of the rollout engine on one rank, in bytes.

    Attributes:
        weights: bytes that it holds through the whole run, asleep or not.
        cache: bytes of the key/value cache in generation; of vLLM that sleeps between generations, all that it takes.
        working: bytes that prefill or decoding holds beside the cache.
        streamed: bytes of its weights while they are replaced, where it does not hold them through the whole run.
    """

    weights: int
    cache: int
    working: int
    streamed: int


NONE = EngineMemory(weights=0, cache=0, working=0, streamed=0)  # servers hold the model on devices of their own


def vllm(policy: Policy, hf_config: Any, numel: int, nbytes: int, gpu_memory: float) -> EngineMemory:
    """Return what vLLM takes in the training processes: its share of the GPU, asleep or not.

    Args:
        policy: the recipe's section.
        hf_config: transformers' configuration of the model.
        numel: number of the model's parameters.
        nbytes: bytes of a weight's element.
        gpu_memory: bytes of one GPU.

    Raises:
        ValueError: the share does not hold the weights and the cache of one sequence.
    """
    options = policy.generation.vllm_cfg
    share, ranks = round(options.gpu_memory_utilization * gpu_memory), options.tensor_parallel_size
    weights = nbytes * numel // ranks
    one = cache(hf_config.get_text_config(), 1, policy.max_total_sequence_length, nbytes) // ranks
    if weights + one > share:
        raise ValueError(
            f"policy.generation.vllm_cfg.gpu_memory_utilization: {options.gpu_memory_utilization} of a GPU is "
            f"{share / 1e9:.1f} GB, but weights take {weights / 1e9:.1f} GB and the cache of one sequence "
            f"{one / 1e9:.1f} GB; raise it, or policy.generation.vllm_cfg.tensor_parallel_size"
        )
    if options.sleep:
        asleep = 0 if options.enforce_eager else ASLEEP
        return EngineMemory(weights=asleep, cache=share - asleep, working=0, streamed=weights)
    return EngineMemory(weights=share, cache=0, working=0, streamed=0)


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
    text = hf_config.get_text_config()
    tokens = prompts * prompt_tokens
    # Gate, up and their product; the residual and a norm in float32.
    language = tokens * (3 * nbytes * text.intermediate_size + (2 * nbytes + 3 * FP32) * text.hidden_size)
    images = _images_working(hf_config, prompts * image_tokens, nbytes) if image_tokens else 0
    # Logits; then scores, their exponentials and cumulative sums in float64 (``rollout.transformers.sampling.draw``).
    decoding = sequences * text.vocab_size * (nbytes + 4 * _FLOAT64)
    return max(language, images, decoding)


def _images_working(hf_config: Any, merged: int, nbytes: int) -> int:
    """Return the bytes that the vision tower needs for ``merged`` image tokens at once, without gradient."""
    tower, geometry = hf_config.vision_config, vision.geometry_of(hf_config)
    patches = merged * geometry.merge**2
    # Queries and keys in float32 with their rotated halves, or the MLP; the features go to the language model.
    block = max(8 * FP32 * tower.hidden_size, 2 * nbytes * tower.intermediate_size) + 4 * nbytes * tower.hidden_size
    images = patches * (block + FP32 * geometry.patch_values)
    return images + vision.features(geometry, merged, nbytes)
