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
# The embedded engine's cache grows by so many tokens a response, and a pass of its prefill has so many tokens and
# patches at most, unless one prompt or one image has more (``rollout.transformers``).
_GROWTH, _PASS_TOKENS, _PASS_PATCHES = 64, 8192, 16384
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
    text = hf_config.get_text_config()
    one = text.num_hidden_layers * policy.max_total_sequence_length * layer_cache(text, nbytes) // ranks
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


def layer_cache(text: Any, nbytes: int) -> int:
    """Return the bytes of one layer's key and value of one token."""
    return 2 * text.num_key_value_heads * head_dim(text) * nbytes


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What the embedded engine has in its batch at once, at most.

    Attributes:
        sequences: number of responses.
        prompts: number of distinct prompts of these, each of which is in the cache once.
        prompt_tokens, response_tokens: number of tokens of each.
        image_tokens: number of image tokens of each prompt, after merging.
    """

    sequences: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    image_tokens: int

    @classmethod
    def of(cls, policy: Policy, samples: int, image_tokens: int) -> Decoding:
        """Return a batch of responses of the greatest length, whose prompts have ``samples`` of them each.

        Groups are assumed to end together. One prompt more than fits is there while one group leaves and the next
        enters.
        """
        sequences, responses = policy.generation.batch_size, policy.generation.max_new_tokens
        prompt_tokens = policy.max_total_sequence_length - responses
        return cls(
            sequences=sequences,
            prompts=min(-(-sequences // samples) + 1, sequences),
            prompt_tokens=prompt_tokens,
            response_tokens=responses,
            image_tokens=min(image_tokens, prompt_tokens),
        )


def cache(text: Any, batch: Decoding, nbytes: int) -> int:
    """Return the bytes of the key/value cache of a full batch.

    It holds keys and values of all layers: of each prompt once, and of each response. Those of one layer are there
    twice while they are moved; those of new prompts, as they come out of the prefill, before any response is long.

    Args:
        text: the model's ``text_config``.
        batch: the batch.
        nbytes: bytes of an element.
    """
    layer, layers = layer_cache(text, nbytes), text.num_hidden_layers
    prompts = batch.prompts * batch.prompt_tokens
    begins = layers * (2 * prompts + batch.sequences * _GROWTH)
    ends = (layers + 1) * (prompts + batch.sequences * (batch.response_tokens + _GROWTH))
    return layer * max(begins, ends)


def working(hf_config: Any, batch: Decoding, nbytes: int) -> int:
    """Return the bytes that prefill or decoding needs beside the cache, whichever needs more; no gradient is kept.

    Args:
        hf_config: transformers' configuration of the model.
        batch: the batch.
        nbytes: bytes of an activation's element.
    """
    text = hf_config.get_text_config()
    tokens = max(batch.prompt_tokens, min(batch.prompts * batch.prompt_tokens, _PASS_TOKENS))
    # Gate, up and their product; the residual and a norm in float32.
    language = tokens * (3 * nbytes * text.intermediate_size + (2 * nbytes + 3 * FP32) * text.hidden_size)
    images = _images_working(hf_config, batch, nbytes) if batch.image_tokens else 0
    # Logits; then scores, their exponentials and cumulative sums in float64 (``rollout.transformers.sampling``).
    drawing = batch.sequences * text.vocab_size * (nbytes + 4 * _FLOAT64)
    # Scores of prompts and of responses, both together, their softmax in float32 and in the model's dtype.
    keys = batch.prompt_tokens + batch.response_tokens + _GROWTH
    attention = batch.sequences * text.num_attention_heads * keys * (3 * nbytes + FP32)
    return max(language, images, drawing, attention)


def _images_working(hf_config: Any, batch: Decoding, nbytes: int) -> int:
    """Return the bytes that the vision tower needs for a pass of the prefill, without gradient."""
    tower, geometry = hf_config.vision_config, vision.geometry_of(hf_config)
    largest = batch.image_tokens * geometry.merge**2
    patches = max(largest, min(batch.prompts * largest, _PASS_PATCHES))
    # Queries and keys in float32 with their rotated halves, or the MLP; the features go to the language model.
    block = max(8 * FP32 * tower.hidden_size, 2 * nbytes * tower.intermediate_size) + 4 * nbytes * tower.hidden_size
    features = vision.features(geometry, batch.prompts * batch.image_tokens, nbytes)
    return patches * (block + FP32 * geometry.patch_values) + features
