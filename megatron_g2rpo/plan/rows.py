# SPDX-License-Identifier: Apache-2.0
"""Packed rows: tokens, sequences and images of a micro-batch, and how many micro-batches an optimizer step takes.

What a run samples is not known beforehand, so a plan assumes that all sequences have one length and every prompt has
one image; the packing is then the packer's own. Memory is planned for a row that is full to its budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_g2rpo.data.bins import Cost, assign_bins, round_up
from megatron_g2rpo.plan.vision import geometry_of, sees
from megatron_g2rpo.policy.layouts.attention_pieces import buckets_of, pieces_of_row
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.recipe import Recipe, TrainRecipe


@dataclass(frozen=True)
class Assumptions:
    """The assumptions that a plan makes about the data.

    Attributes:
        sequence_tokens: number of tokens of every sequence, prompt and response.
        image_tokens: number of tokens of the one image of every prompt, after merging; 0 for text-only prompts.
        response_tokens: number of tokens of every response, of those of the sequence.
        gpu_memory: bytes of one GPU, of which vLLM in the training processes takes a share.
    """

    sequence_tokens: int
    image_tokens: int
    response_tokens: int
    gpu_memory: float


def assume(
    recipe: Recipe,
    hf_config: Any,
    mean_tokens: int | None,
    image_tokens: int | None,
    gpu_memory: float,
    response_tokens: int | None = None,
) -> Assumptions:
    """Return the assumptions about the data: the worst case, unless the caller gives numbers.

    Args:
        recipe: the recipe.
        hf_config: transformers' configuration of the model.
        mean_tokens: number of tokens of a sequence, prompt and response; None for
            ``policy.max_total_sequence_length``.
        image_tokens: number of image tokens of a prompt; None for an image of ``data.max_pixels``, or, where the recipe
            leaves that to the image processor, for a prompt that is all image. A text-only model has 0.
        gpu_memory: bytes of one GPU.
        response_tokens: number of tokens of a response; None for all that is no image, ``generation.max_new_tokens`` at
            most.

    Raises:
        ValueError: a number is out of the range that the recipe allows.
    """
    longest = recipe.policy.max_total_sequence_length
    tokens = longest if mean_tokens is None else mean_tokens
    if not 1 <= tokens <= longest:
        raise ValueError(f"--mean-tokens {tokens} is not in 1..policy.max_total_sequence_length ({longest})")
    limit = min(longest - recipe.policy.generation.max_new_tokens, tokens)
    if not sees(hf_config):
        if image_tokens:
            raise ValueError(f"--image-tokens {image_tokens}: {hf_config.model_type} is a text-only model")
        image_tokens = 0
    elif image_tokens is None:
        side = hf_config.vision_config.patch_size * geometry_of(hf_config).merge
        pixels = recipe.data.max_pixels
        image_tokens = limit if pixels is None else min(limit, max(pixels // side**2, 1))
    if not 0 <= image_tokens <= limit:
        raise ValueError(f"--image-tokens {image_tokens} does not fit into a prompt: it has room for {limit} tokens")
    most = min(recipe.policy.generation.max_new_tokens, tokens - image_tokens)
    response = most if response_tokens is None else response_tokens
    if not 0 <= response <= most:
        raise ValueError(f"--response-tokens {response} does not fit: a sequence of {tokens} has room for {most}")
    return Assumptions(
        sequence_tokens=tokens, image_tokens=image_tokens, response_tokens=response, gpu_memory=gpu_memory
    )


@dataclass(frozen=True)
class Row:
    """The sizes of one packed row on which memory and traffic depend.

    Attributes:
        lengths: number of tokens of each sequence, without padding.
        padded: number of tokens of each sequence, with the padding that follows it in the row.
        images: number of tokens of each distinct image, after merging.
        placeholders: number of the row's tokens that an image feature replaces; each rollout of a group has its own.
        labels: number of the row's tokens that predict a token of a response.
    """

    lengths: tuple[int, ...]
    padded: tuple[int, ...]
    images: tuple[int, ...]
    placeholders: int
    labels: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole row, padding included."""
        return sum(self.padded)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one optimizer step.

    Attributes:
        row: a packed row that is full to its budget.
        count: number of micro-batches of a data-parallel rank.
        tokens: number of tokens of a data-parallel rank's micro-batches together, padding included.
        images: number of distinct images in each of a data-parallel rank's micro-batches, summed.
        sequences: number of sequences of a data-parallel rank.
    """

    row: Row
    count: int
    tokens: int
    images: int
    sequences: int


def micro_batches(recipe: Recipe, layout: Layout, assumptions: Assumptions) -> MicroBatches:
    """Pack the sequences of one optimizer step, on the data-parallel rank that has the most prompts."""
    sequence_multiple, row_multiple = token_multiples(layout)
    budget = round_up(recipe.policy.sequence_packing.train_mb_tokens, row_multiple)
    length = round_up(assumptions.sequence_tokens, sequence_multiple)
    samples = recipe.grpo.num_generations_per_prompt if isinstance(recipe, TrainRecipe) else 1
    prompts = -(-recipe.policy.train_global_batch_size // samples)
    mine = -(-prompts // recipe.data_parallel_size) * samples
    groups = [index // samples if assumptions.image_tokens else index for index in range(mine)]
    bins = assign_bins([Cost(whole=length, trunk=0, branch=length)] * mine, budget, groups)
    images = [len({groups[index] for index in members}) if assumptions.image_tokens else 0 for members in bins]
    # Full rows: whole sequences, and what is left of the budget as one more.
    whole, rest = divmod(budget, length)
    padded = [length] * whole + ([rest] if rest else [])
    real = [min(assumptions.sequence_tokens, size) for size in padded]
    return MicroBatches(
        row=Row(
            lengths=tuple(real),
            padded=tuple(padded),
            images=(assumptions.image_tokens,) * max(images),
            placeholders=sum(min(assumptions.image_tokens, length) for length in real),
            labels=sum(min(recipe.policy.generation.max_new_tokens, length) for length in real),
        ),
        count=len(bins),
        tokens=sum(round_up(length * len(members), row_multiple) for members in bins),
        images=sum(images),
        sequences=mine,
    )


@dataclass(frozen=True)
class Slots:
    """Sizes of the local core attention's padded batches on one context-parallel rank, summed over buckets.

    Attributes:
        tokens: number of real queries, without padding.
        queries, keys: number of query slots and of key slots, padding of the buckets included.
        mask: number of elements of the masks (0 without context parallelism, where ``is_causal`` suffices).
    """

    tokens: int
    queries: int
    keys: int
    mask: int


def attention_slots(row: Row, size: int, rank: int) -> Slots:
    """Return the sizes of the padded batches that ``policy.attention`` makes of a packed row.

    Args:
        row: the whole packed row.
        size: number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.
    """
    pieces = pieces_of_row(row.lengths, [0, *accumulate(row.padded)], size, rank)
    total = Slots(sum(piece.length for piece in pieces), 0, 0, 0)
    for members in buckets_of(pieces):
        count, longest = len(members), max(piece.length for piece in members)
        widest = max(piece.keys for piece in members)
        total = Slots(
            tokens=total.tokens,
            queries=total.queries + count * longest,
            keys=total.keys + count * widest,
            mask=total.mask + (count * longest * widest if size > 1 else 0),
        )
    return total


def widest_slots(row: Row, size: int) -> Slots:
    """Return the sizes of the padded batches on the context-parallel rank that has the most query and key slots."""
    return max((attention_slots(row, size, rank) for rank in range(size)), key=lambda s: (s.queries + s.keys, s.mask))
