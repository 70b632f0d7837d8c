# SPDX-License-Identifier: Apache-2.0
"""Rows: how many tokens, sequences and images a micro-batch holds, and how many micro-batches an optimizer step takes.

What a run samples is not known beforehand, so a plan assumes that all sequences have one length and every prompt one
image; the packing is then the packer's own. Memory is planned for a row that is full to its budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_g2rpo.data.packing import assign_bins, round_up
from megatron_g2rpo.plan.vision import geometry_of
from megatron_g2rpo.policy.layouts.attention_pieces import buckets_of, pieces_of_row
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.recipe import Recipe, TrainRecipe


@dataclass(frozen=True)
class Assumptions:
    """What stands for the data.

    Attributes:
        sequence_tokens: prompt and response of every sequence.
        image_tokens: of the one image of every prompt, after merging; 0 for text.
    """

    sequence_tokens: int
    image_tokens: int


def assume(
    recipe: Recipe, hf_config: Any, mean_tokens: int | None = None, image_tokens: int | None = None
) -> Assumptions:
    """The worst case, where it is not said otherwise.

    Args:
        recipe: the recipe.
        hf_config: of the model.
        mean_tokens: of a sequence, prompt and response; None for ``policy.max_total_sequence_length``.
        image_tokens: of a prompt; None for an image of ``data.max_pixels``, or, where the recipe leaves that to the
            image processor, for a prompt that is all image.

    Raises:
        ValueError: more tokens than the recipe allows.
    """
    longest = recipe.policy.max_total_sequence_length
    tokens = longest if mean_tokens is None else mean_tokens
    if not 1 <= tokens <= longest:
        raise ValueError(f"--mean-tokens {tokens} is not in 1..policy.max_total_sequence_length ({longest})")
    room = min(longest - recipe.policy.generation.max_new_tokens, tokens)
    if image_tokens is None:
        side = hf_config.vision_config.patch_size * geometry_of(hf_config).merge
        image_tokens = room if recipe.data.max_pixels is None else min(room, max(recipe.data.max_pixels // side**2, 1))
    if not 0 <= image_tokens <= room:
        raise ValueError(f"--image-tokens {image_tokens} does not fit into a prompt: it has room for {room} tokens")
    return Assumptions(sequence_tokens=tokens, image_tokens=image_tokens)


@dataclass(frozen=True)
class Row:
    """One packed row, as memory and traffic see it.

    Attributes:
        lengths: tokens of each sequence.
        padded: the same with the padding that follows them in the row.
        images: tokens of each distinct image, after merging.
        placeholders: tokens of the row that an image feature replaces; samples of a group have them each.
        labels: tokens of the row that predict a token of a response.
    """

    lengths: tuple[int, ...]
    padded: tuple[int, ...]
    images: tuple[int, ...]
    placeholders: int
    labels: int

    @property
    def tokens(self) -> int:
        """Of the whole row, padding included."""
        return sum(self.padded)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one optimizer step.

    Attributes:
        row: a full one.
        count: of a data-parallel rank.
        tokens: of all of them together, padding included.
        images: distinct images of all of them together.
        sequences: of a data-parallel rank.
    """

    row: Row
    count: int
    tokens: int
    images: int
    sequences: int


def micro_batches(recipe: Recipe, layout: Layout, assumptions: Assumptions) -> MicroBatches:
    """Pack what the data-parallel rank with the most prompts packs for one optimizer step."""
    sequence_multiple, row_multiple = token_multiples(layout)
    budget = round_up(recipe.policy.sequence_packing.train_mb_tokens, row_multiple)
    length = round_up(assumptions.sequence_tokens, sequence_multiple)
    samples = recipe.grpo.num_generations_per_prompt if isinstance(recipe, TrainRecipe) else 1
    prompts = -(-recipe.policy.train_global_batch_size // samples)
    mine = -(-prompts // recipe.data_parallel_size) * samples
    groups = [index // samples if assumptions.image_tokens else index for index in range(mine)]
    bins = assign_bins([length] * mine, budget, groups)
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
        queries, keys: tokens, padding of the buckets included.
        mask: elements of the masks (none without context parallelism, where causality says it all).
        tokens: real ones, without padding.
    """

    tokens: int
    queries: int
    keys: int
    mask: int


def attention_slots(row: Row, size: int, rank: int) -> Slots:
    """Sizes of what ``policy.attention`` lays out for a row, see ``layouts.attention_pieces``.

    Args:
        row: the whole row.
        size: context-parallel ranks.
        rank: one of them.
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
    """Of the context-parallel rank that holds the most."""
    return max((attention_slots(row, size, rank) for rank in range(size)), key=lambda s: (s.queries + s.keys, s.mask))
