# SPDX-License-Identifier: Apache-2.0
"""Time of generation: prompts are bound by arithmetic, decoding by the bytes that every step reads.

A decoding step of an engine reads all of its weights and the keys and values of every sequence in it. What is assumed
beside the card's data sheet stands on top; docs/plan.md holds the result against published steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.models.cards import Card
from megatron_g2rpo.plan import flops
from megatron_g2rpo.plan.flops import Shape

BANDWIDTH = 0.7  # share of the memory's bandwidth that decoding reaches
ARITHMETIC = 0.4  # share of the peak that prefill, and large batches, reach
STEP_S = 5e-3  # of scheduling, sampling and launching, each step of a serving engine
EAGER_STEP_S = 30e-3  # ... of the embedded engine, which launches every kernel by itself
ALL_REDUCE_S = 15e-6  # latency of an all-reduce of one step's hidden states within a node; two a layer


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One rollout engine.

    Attributes:
        ranks: GPUs that share it.
        batch: most sequences in it at once.
        serving: whether a sequence that ends makes room for the next; otherwise a batch ends with its longest.
        weight_bytes, cache_bytes: bytes of an element of its weights and of its cache.
        memory: bytes that its GPUs have together for weights and cache.
    """

    ranks: int
    batch: int
    serving: bool
    weight_bytes: int
    cache_bytes: int
    memory: float


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What one engine generates in a step.

    Attributes:
        prompts: number of prompts, each prefilled once for all of its samples.
        samples: responses of each prompt.
        prompt_tokens: tokens of a prompt, image tokens included.
        image_tokens: image tokens of a prompt.
        mean: tokens of a response, on average.
        longest: tokens of the longest one, on which the step waits.
    """

    prompts: float
    samples: int
    prompt_tokens: float
    image_tokens: int
    mean: float
    longest: float


def seconds(shape: Shape, engine: Engine, responses: Responses, card: Card) -> float:
    """Return the time of one engine's generation, seconds."""
    return _prefill(shape, engine, responses, card) + _decode(shape, engine, responses, card)


def _prefill(shape: Shape, engine: Engine, responses: Responses, card: Card) -> float:
    pass_ = flops.forward(
        shape,
        tokens=responses.prompts * responses.prompt_tokens,
        pairs=responses.prompts * flops.causal_pairs(responses.prompt_tokens),
        labels=responses.prompts,
        images=responses.prompts if responses.image_tokens else 0,
        image_tokens=responses.image_tokens,
    )
    return pass_.total / (engine.ranks * ARITHMETIC * card.bf16)


def _decode(shape: Shape, engine: Engine, responses: Responses, card: Card) -> float:
    count, mean, longest = responses.prompts * responses.samples, responses.mean, responses.longest
    token = shape.layers * shape.cached * engine.cache_bytes
    weights = shape.weights * engine.weight_bytes
    # The cache holds fewer sequences than the recipe allows where they are long.
    room = max((engine.memory - weights) / (token * (responses.prompt_tokens + mean)), 1.0)
    batch = min(engine.batch, count, room)
    # With continuous batching the last to start are still running when the engine has emptied otherwise; one batch
    # after the other waits for the longest of each.
    steps = count * mean / batch + (longest - mean) if engine.serving else -(-count // batch) * longest
    # The mean square of the lengths lies between that of equal ones and that of ones that are all 0 or the longest.
    square = mean * (mean + longest) / 2
    read = steps * weights + count * token * (responses.prompt_tokens * mean + square / 2)
    computed = 2 * count * mean * (shape.layers * shape.linear + shape.hidden * shape.vocabulary)
    bound = max(read / (BANDWIDTH * card.bandwidth), computed / (ARITHMETIC * card.bf16)) / engine.ranks
    latency = 2 * shape.layers * ALL_REDUCE_S if engine.ranks > 1 else 0.0
    return bound + steps * (latency + (STEP_S if engine.serving else EAGER_STEP_S))
