# SPDX-License-Identifier: Apache-2.0
"""Packed rows: tokens, sequences and images of a micro-batch, and how many micro-batches an optimizer step takes.

What a run samples is not known beforehand, so a plan assumes that all prompts have one length and one image, and all
responses one length; the packing is then the packer's own. Memory is planned for a row that is full to its budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.data.bins import Cost, assign_bins, round_up, shares_trunk, tokens_of
from megatron_g2rpo.plan.flops import causal_pairs
from megatron_g2rpo.plan.vision import geometry_of, sees
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

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of every prompt."""
        return self.sequence_tokens - self.response_tokens


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
        lengths: number of tokens of each segment, without padding: of a whole sequence, of the trunk that the
            responses of a group share, or of one of these (``data.bins``).
        padded: number of tokens of each segment, with the padding that follows it in the row.
        parents: the segment that each continues, a response its trunk; -1 for none.
        images: number of tokens of each distinct image, after merging.
        placeholders: number of the row's tokens that an image feature replaces; each copy of a prompt has its own.
        labels: number of the row's tokens that predict a token of a response.
    """

    lengths: tuple[int, ...]
    padded: tuple[int, ...]
    parents: tuple[int, ...]
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
        computed: the same without padding; a prompt that responses share counts once in each row.
        pairs: number of pairs of a query and a key that a data-parallel rank's core attention has.
        images: number of distinct images in each of a data-parallel rank's micro-batches, summed.
        sequences: number of sequences of a data-parallel rank.
        together: most responses that share a copy of their prompt in one row; 1 where none do.
    """

    row: Row
    count: int
    tokens: int
    computed: int
    pairs: float
    images: int
    sequences: int
    together: int = 1


def shares_prompts(recipe: Recipe) -> bool:
    """Return whether a recipe's rows hold a prompt once for the responses of its group."""
    return recipe.policy.sequence_packing.shared_prefix


def micro_batches(recipe: Recipe, layout: Layout, assumptions: Assumptions) -> MicroBatches:
    """Pack the sequences of one optimizer step, on the data-parallel rank that has the most prompts."""
    sequence_multiple, row_multiple = token_multiples(layout)
    budget = round_up(recipe.policy.sequence_packing.train_mb_tokens, row_multiple)
    shares = shares_prompts(recipe)
    prompt, response = assumptions.prompt_tokens, assumptions.response_tokens
    cost = Cost.of(prompt, response, sequence_multiple, shares=shares)
    samples = recipe.grpo.num_generations_per_prompt if isinstance(recipe, TrainRecipe) else 1
    prompts = -(-recipe.policy.train_global_batch_size // samples)
    mine = -(-prompts // recipe.data_parallel_size) * samples
    # As the packer does: what shares neither its prompt nor its images has nothing that a row would pay for twice.
    groups = [index // samples if assumptions.image_tokens or shares else index for index in range(mine)]
    bins = assign_bins([cost] * mine, budget, groups)
    members = [Counter(groups[index] for index in each).values() for each in bins]
    images = [len(parts) if assumptions.image_tokens else 0 for parts in members]
    parts = Counter(count for each in members for count in each)  # of groups in a row, by their number of responses
    return MicroBatches(
        row=_full_row(cost, budget, sequence_multiple, samples, max(images), recipe, assumptions),
        count=len(bins),
        tokens=sum(round_up(sum(tokens_of([cost] * count) for count in each), row_multiple) for each in members),
        computed=sum(times * _part(cost, count, prompt, response)[0] for count, times in parts.items()),
        pairs=sum(times * _part(cost, count, prompt, response)[1] for count, times in parts.items()),
        images=sum(images),
        sequences=mine,
        together=max(count if shares_trunk([cost] * count) else 1 for count in parts),
    )


def _part(cost: Cost, count: int, prompt: int, response: int) -> tuple[int, float]:
    """Return tokens without padding, and pairs of queries and keys, of so many responses of a group in one row."""
    if not shares_trunk([cost] * count):
        return count * (prompt + response), count * causal_pairs(prompt + response)
    trunk = prompt - 1
    return trunk + count * response, causal_pairs(trunk) + count * causal_pairs(response, before=trunk)


def _full_row(
    cost: Cost, budget: int, multiple: int, samples: int, images: int, recipe: Recipe, assumptions: Assumptions
) -> Row:
    """Return a row that is full to its budget: whole groups or sequences, and of one more as much as there is room for.

    Where a group of the assumed lengths does not fit into a row, shorter responses of it may: memory is planned for the
    trunk and all of its responses in what is left, because the core attention may keep the trunk's keys and values for
    each of them.
    """
    row = _Filling(multiple, assumptions, recipe.policy.generation.max_new_tokens)
    if not shares_trunk([cost] * samples):
        while row.tokens + cost.whole <= budget:
            row.add_sequence(cost.whole)
    else:
        group = tokens_of([cost] * samples)
        while row.tokens + group <= budget:
            row.add_group(cost.trunk, [cost.branch] * samples)
        rest = max(budget - row.tokens - cost.trunk, 0)
        longest = cost.branch if row.tokens else max(rest // samples // multiple, 1) * multiple
        whole = min(rest // longest, samples - 1)
        branches = [longest] * whole + ([rest - whole * longest] if rest > whole * longest else [])
        if len(branches) > 1:
            row.add_group(cost.trunk, branches)
    if row.tokens < budget:
        row.add_sequence(budget - row.tokens)
    return row.finished(images)


class _Filling:
    """A row that segments are added to, in tokens with padding.

    Args:
        multiple: number that the tokens of every segment are a multiple of.
        assumptions: what stands for the data.
        most: most tokens of a response.
    """

    def __init__(self, multiple: int, assumptions: Assumptions, most: int) -> None:
        self._multiple, self._assumptions, self._most = multiple, assumptions, most
        self._lengths: list[int] = []
        self._padded: list[int] = []
        self._parents: list[int] = []
        self._placeholders = self._labels = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of the segments so far, padding included."""
        return sum(self._padded)

    def add_sequence(self, padded: int) -> None:
        """Add a prompt with its response."""
        length = min(self._assumptions.sequence_tokens, padded)
        self._add(length, padded, -1)
        self._placeholders += min(self._assumptions.image_tokens, length)
        self._labels += min(self._most, length)

    def add_group(self, trunk: int, branches: Sequence[int]) -> None:
        """Add a trunk and the responses that share it."""
        parent, length = len(self._lengths), min(self._assumptions.prompt_tokens - 1, trunk)
        self._add(length, trunk, -1)
        self._placeholders += min(self._assumptions.image_tokens, length)
        for padded in branches:
            length = min(self._assumptions.response_tokens, padded)
            self._add(length, padded, parent)
            self._labels += length

    def _add(self, length: int, padded: int, parent: int) -> None:
        self._lengths.append(length)
        self._padded.append(padded)
        self._parents.append(parent)

    def finished(self, images: int) -> Row:
        """Return the row, with so many distinct images."""
        return Row(
            lengths=tuple(self._lengths),
            padded=tuple(self._padded),
            parents=tuple(self._parents),
            images=(self._assumptions.image_tokens,) * images,
            placeholders=self._placeholders,
            labels=self._labels,
        )
