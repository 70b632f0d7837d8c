# SPDX-License-Identifier: Apache-2.0
"""Packing of sequences of different lengths into rows (micro-batches) under a token budget."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_g2rpo.models import Positions
from megatron_g2rpo.models.positions import mrope_positions
from megatron_g2rpo.types import NO_LABEL, ModelInputs, PackedBatch


@dataclass(frozen=True, kw_only=True)
class PackSequence:
    """One sequence to pack: a prompt, its response, and what the loss needs to know of it.

    Attributes:
        inputs: the prompt's model inputs; sequences that share this very object share its images.
        response_ids: int64 ``[R]``.
        advantage: advantage of every response token, where it is known already; else see ``with_advantages``.
        task_id: index of the task.
        behaviour_logprobs: float32 ``[R]``, log-probabilities that the rollout engine reported; None in supervised
            training.
        token_weight: weight of every response token in the loss sum.
        in_loss: False keeps the sequence out of the loss (an overlong response).
        kept_ids: int64 ``[R, K]``, the ids that each token was sampled from, -1 for none; None for all. All sequences
            of a row have them, or none.
    """

    inputs: ModelInputs
    response_ids: Tensor
    advantage: float = 0.0
    task_id: int = 0
    behaviour_logprobs: Tensor | None = None
    token_weight: float = 1.0
    in_loss: bool = True
    kept_ids: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens of prompt and response together."""
        return len(self.inputs.token_ids) + len(self.response_ids)


def assign_bins(lengths: Sequence[int], budget: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Assign sequences to bins by first-fit-decreasing bin packing that keeps groups together.

    A group stays in one bin if it fits, else in as few as first-fit-decreasing finds for it, because the images that
    its members share are processed once per bin. Bins are slightly emptier as a result, which costs nothing where they
    are not padded up to the budget.

    Args:
        lengths: number of tokens of each sequence.
        budget: largest number of tokens in a bin.
        groups: the group of each sequence; None: each sequence is a group of its own.

    Returns:
        Indices of the sequences of each bin, in ascending order.

    Raises:
        ValueError: a sequence does not fit into an empty bin.
    """
    longest = max(lengths, default=0)
    if longest > budget:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the {budget} tokens of a micro-batch; raise "
            "policy.sequence_packing.train_mb_tokens or lower policy.max_total_sequence_length"
        )
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(range(len(lengths)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    items = [
        [group[i] for i in part]
        for group in members.values()
        for part in _first_fit_decreasing([lengths[i] for i in group], budget)
    ]
    bins = _first_fit_decreasing([sum(lengths[i] for i in item) for item in items], budget)
    return [sorted(index for item in chosen for index in items[item]) for chosen in bins]


def _first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((b for b, left in enumerate(free) if left >= sizes[index]), None)
        if fit is None:
            bins.append([])
            free.append(budget)
            fit = len(bins) - 1
        bins[fit].append(index)
        free[fit] -= sizes[index]
    return bins


@dataclass(frozen=True)
class Packer:
    """Packs sequences into micro-batches.

    Attributes:
        image_token_id: placeholder whose embedding an image feature replaces.
        spatial_merge_size: number of vision patches along one side that merge into one feature.
        pad_token_id: token of the padding.
        sequence_multiple: every sequence is padded to a multiple of this, so that context parallelism can cut it.
        row_multiple: every row is padded to a multiple of this (``layouts.layout.token_multiples`` gives both).
        positions: the model family's function for positions, see ``models.base.Family.positions``. The default is that
            of the Qwen-VL family, which counts tokens on text, as every family does.
    """

    image_token_id: int
    spatial_merge_size: int
    pad_token_id: int
    sequence_multiple: int = 1
    row_multiple: int = 1
    positions: Positions = mrope_positions

    def __post_init__(self) -> None:
        if self.row_multiple % self.sequence_multiple:
            raise ValueError(f"row_multiple {self.row_multiple} is not a multiple of {self.sequence_multiple}")

    def pack(self, sequences: Sequence[PackSequence], budget: int, num_bins: int | None = None) -> list[PackedBatch]:
        """Pack sequences into rows of at most ``budget`` tokens (rounded up to ``row_multiple``).

        Args:
            sequences: the sequences to pack.
            budget: largest number of tokens of a row.
            num_bins: pad the result with empty rows to this number, so that every data-parallel rank runs the same
                number of micro-batches; None for no padding.

        Raises:
            ValueError: a sequence exceeds the budget, or more than ``num_bins`` rows are needed.
        """
        bins = self._bins(sequences, budget)
        if num_bins is not None:
            if len(bins) > num_bins:
                raise ValueError(f"{len(bins)} rows are needed, more than the {num_bins} asked for")
            bins += [[] for _ in range(num_bins - len(bins))]
        return [self._row(sequences, members) if members else self._empty_row(sequences) for members in bins]

    def num_rows(self, sequences: Sequence[PackSequence], budget: int) -> int:
        """Return the number of rows that ``pack`` needs."""
        return len(self._bins(sequences, budget))

    def _bins(self, sequences: Sequence[PackSequence], budget: int) -> list[list[int]]:
        lengths = [round_up(sequence.length, self.sequence_multiple) for sequence in sequences]
        # Samples that share images belong together; those without share nothing that a row would pay for twice.
        groups = [
            ("prompt", id(sequence.inputs)) if len(sequence.inputs.image_grid_thw) else ("sequence", index)
            for index, sequence in enumerate(sequences)
        ]
        return assign_bins(lengths, round_up(budget, self.row_multiple), groups)

    def _row(self, sequences: Sequence[PackSequence], members: list[int]) -> PackedBatch:
        parts = [sequences[index] for index in members]
        distinct = {id(part.inputs): part.inputs for part in parts}
        first_feature: dict[int, int] = {}
        total = 0
        for key, inputs in distinct.items():
            first_feature[key] = total
            total += self._features(inputs)
        lengths = [part.length for part in parts]
        padded = [round_up(length, self.sequence_multiple) for length in lengths]
        padded[-1] += -sum(padded) % self.row_multiple  # the row's own padding follows its last sequence
        fields = [
            self._fields(part, segment, size, first_feature[id(part.inputs)])
            for segment, (part, size) in enumerate(zip(parts, padded, strict=True))
        ]
        return PackedBatch(
            **{name: torch.cat([field[name] for field in fields], dim=-1) for name in fields[0]},
            cu_seqlens=_offsets(lengths),
            cu_seqlens_padded=_offsets(padded),
            pixel_values=torch.cat([inputs.pixel_values for inputs in distinct.values()]),
            image_grid_thw=torch.cat([inputs.image_grid_thw for inputs in distinct.values()]),
            sequence_ids=torch.tensor(members),
            kept_ids=_kept_ids(parts, padded),
        )

    def _features(self, inputs: ModelInputs) -> int:
        return int(inputs.image_grid_thw.prod(dim=1).sum()) // self.spatial_merge_size**2

    def _fields(self, part: PackSequence, segment: int, size: int, first_feature: int) -> dict[str, Tensor]:
        """Return the per-token fields of one sequence, aligned with the predicting position and padded to ``size``."""
        prompt, response = part.inputs.token_ids, part.response_ids
        tokens = torch.cat([prompt, response])
        first = len(prompt) - 1  # the position that predicts the first response token
        span = slice(first, first + len(response))

        def spread(values: Tensor | float) -> Tensor:
            out = torch.zeros(size)
            out[span] = values
            return out

        # Shifted within the sequence: a roll over the row would wrap its last token to a neighbour. Prompt tokens are
        # no labels: nothing is asked of them, and over a large vocabulary a label is what costs.
        labels = torch.full((size,), NO_LABEL)
        labels[span] = response
        task_ids = torch.full((size,), -1)
        task_ids[span] = part.task_id
        positions = self.positions(
            tokens,
            part.inputs.image_grid_thw,
            image_token_id=self.image_token_id,
            spatial_merge_size=self.spatial_merge_size,
        )
        placeholders = tokens == self.image_token_id
        vision_index = torch.where(placeholders, placeholders.cumsum(0) - 1 + first_feature, -1)
        padding = size - part.length
        return {
            "tokens": F.pad(tokens, (0, padding), value=self.pad_token_id),
            "labels": labels,
            "position_ids": F.pad(positions, (0, padding)),
            "segment_ids": F.pad(torch.full((part.length,), segment), (0, padding), value=-1),
            "loss_mask": spread(float(part.in_loss)),
            "task_ids": task_ids,
            "advantages": spread(part.advantage),
            "behaviour_logprobs": spread(0.0 if part.behaviour_logprobs is None else part.behaviour_logprobs),
            "token_weights": spread(part.token_weight * part.in_loss),
            "vision_index": F.pad(vision_index, (0, padding), value=-1),
        }

    def _empty_row(self, sequences: Sequence[PackSequence]) -> PackedBatch:
        """Return the shortest possible row: one sequence of padding, from which nothing is learned."""
        size = self.row_multiple
        zero, none = torch.zeros(size), torch.full((size,), -1)
        patch_dim = sequences[0].inputs.pixel_values.shape[1] if sequences else 0
        return PackedBatch(
            tokens=torch.full((size,), self.pad_token_id),
            labels=torch.full((size,), NO_LABEL),
            position_ids=torch.zeros(3, size, dtype=torch.int64),
            segment_ids=none,
            cu_seqlens=_offsets([size]),
            cu_seqlens_padded=_offsets([size]),
            loss_mask=zero,
            pixel_values=torch.zeros(0, patch_dim),
            image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
            vision_index=none,
            sequence_ids=torch.zeros(0, dtype=torch.int64),
            task_ids=none,
            advantages=zero,
            behaviour_logprobs=zero,
            token_weights=zero,
        )


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a value."""
    return -(-value // multiple) * multiple


def _kept_ids(parts: Sequence[PackSequence], padded: Sequence[int]) -> Tensor | None:
    """Return the ids that each label of a row was sampled from, int64 ``[K, S]``; None where all could be sampled."""
    known = [part.kept_ids for part in parts if part.kept_ids is not None]
    if not known:
        return None
    if len(known) != len(parts):
        raise ValueError(f"of {len(parts)} sequences, {len(known)} say what their tokens were sampled from: all must")
    row = torch.full((max(kept.shape[1] for kept in known), sum(padded)), -1)
    start = 0
    for part, kept, size in zip(parts, known, padded, strict=True):
        first = start + len(part.inputs.token_ids) - 1  # as in Packer._fields
        row[: kept.shape[1], first : first + len(kept)] = kept.t()
        start += size
    return row


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def with_advantages(batch: PackedBatch, advantages: Tensor) -> PackedBatch:
    """Return a packed row with the given advantages.

    Args:
        batch: the packed row.
        advantages: advantage of each sequence that was packed, those of other rows included;
            ``PackedBatch.sequence_ids`` says which of them are in this row.
    """
    of_segment = torch.cat([advantages[batch.sequence_ids].float(), torch.zeros(1)])  # the last for segment -1, padding
    return replace(batch, advantages=torch.where(batch.task_ids >= 0, of_segment[batch.segment_ids], 0.0))


def response_values(batch: PackedBatch, values: Tensor) -> dict[int, Tensor]:
    """Cut per-token values of a packed row back into responses.

    Args:
        batch: the packed row.
        values: ``[S]``, aligned with the predicting position.

    Returns:
        Index of the packed sequence -> ``[R]``, the values of its response tokens.
    """
    response = batch.task_ids >= 0
    return {
        int(row): values[response & (batch.segment_ids == segment)]
        for segment, row in enumerate(batch.sequence_ids.tolist())
    }
