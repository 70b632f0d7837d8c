# SPDX-License-Identifier: Apache-2.0
"""Packing of sequences of different lengths into rows (micro-batches) under a token budget.

``data.bins`` says which sequences share a row, and when those of a group share a copy of their prompt in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_g2rpo.data.bins import Cost, assign_bins, round_up, shares_trunk
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


@dataclass(frozen=True)
class Packer:
    """Packs sequences into micro-batches.

    Attributes:
        image_token_id: placeholder whose embedding an image feature replaces.
        spatial_merge_size: number of vision patches along one side that merge into one feature.
        pad_token_id: token of the padding.
        sequence_multiple: every segment of a row is padded to a multiple of this, so that context parallelism can cut
            it.
        row_multiple: every row is padded to a multiple of this (``layouts.layout.token_multiples`` gives both).
        positions: the model family's function for positions, see ``models.base.Family.positions``. The default is that
            of the Qwen-VL family, which counts tokens on text, as every family does.
        shared_prefix: whether sequences with one prompt share a copy of it in a row, see ``data.bins``.
    """

    image_token_id: int
    spatial_merge_size: int
    pad_token_id: int
    sequence_multiple: int = 1
    row_multiple: int = 1
    positions: Positions = mrope_positions
    shared_prefix: bool = False

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
            ValueError: a sequence exceeds the budget, more than ``num_bins`` rows are needed, or a response is empty or
                has an image placeholder.
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
        # Samples that share a prompt or images belong together; others share nothing that a row would pay for twice.
        groups = [
            ("prompt", id(sequence.inputs))
            if self.shared_prefix or len(sequence.inputs.image_grid_thw)
            else ("sequence", index)
            for index, sequence in enumerate(sequences)
        ]
        return assign_bins([self._cost(each) for each in sequences], round_up(budget, self.row_multiple), groups)

    def _cost(self, sequence: PackSequence) -> Cost:
        prompt, response = len(sequence.inputs.token_ids), len(sequence.response_ids)
        if not response:
            raise ValueError("a sequence has no response token, so that nothing of it is predicted: leave it out")
        return Cost.of(prompt, response, self.sequence_multiple, shares=self.shared_prefix)

    def _row(self, sequences: Sequence[PackSequence], members: list[int]) -> PackedBatch:
        kept = sum(sequences[index].kept_ids is not None for index in members)
        if kept not in (0, len(members)):
            raise ValueError(f"of {len(members)} sequences, {kept} say what their tokens were sampled from: all must")
        groups: dict[int, list[int]] = {}
        for index in members:
            groups.setdefault(id(sequences[index].inputs), []).append(index)
        segments: list[_Segment] = []
        features = 0
        for group in groups.values():
            segments += self._segments(sequences, group, first=len(segments), first_feature=features)
            features += self._features(sequences[group[0]].inputs)
        lengths = [segment.length for segment in segments]
        padded = [round_up(length, self.sequence_multiple) for length in lengths]
        padded[-1] += -sum(padded) % self.row_multiple  # the row's own padding follows its last segment
        distinct = [sequences[group[0]].inputs for group in groups.values()]
        return PackedBatch(
            **self._joined([segment.fields for segment in segments], padded),
            segment_ids=_segment_ids(lengths, padded),
            cu_seqlens=_offsets(lengths),
            cu_seqlens_padded=_offsets(padded),
            parents=torch.tensor([segment.parent for segment in segments]),
            pixel_values=torch.cat([inputs.pixel_values for inputs in distinct]),
            image_grid_thw=torch.cat([inputs.image_grid_thw for inputs in distinct]),
            sequence_ids=torch.tensor([segment.sequence for segment in segments]),
        )

    def _features(self, inputs: ModelInputs) -> int:
        return int(inputs.image_grid_thw.prod(dim=1).sum()) // self.spatial_merge_size**2

    def _segments(
        self, sequences: Sequence[PackSequence], group: list[int], *, first: int, first_feature: int
    ) -> list[_Segment]:
        """Return the segments of one prompt's sequences in a row, of which the first has the number ``first``."""
        parts = [sequences[index] for index in group]
        inputs, longest = parts[0].inputs, max(parts, key=lambda part: len(part.response_ids))
        # Positions of a sequence are the beginning of those of a longer one with the same prompt.
        positions = self.positions(
            torch.cat([inputs.token_ids, longest.response_ids]),
            inputs.image_grid_thw,
            image_token_id=self.image_token_id,
            spatial_merge_size=self.spatial_merge_size,
        )
        placeholders = inputs.token_ids == self.image_token_id
        vision_index = torch.where(placeholders, placeholders.cumsum(0) - 1 + first_feature, -1)
        whole = [self._fields(part, positions, vision_index) for part in parts]
        if not shares_trunk([self._cost(part) for part in parts]):
            return [_Segment(fields, index, -1) for fields, index in zip(whole, group, strict=True)]
        shared = len(inputs.token_ids) - 1
        trunk = _Segment(_cut(whole[0], 0, shared), -1, -1)
        # Without the last token, which predicts nothing.
        branches = [
            _Segment(_cut(fields, shared, shared + len(part.response_ids)), index, first)
            for fields, part, index in zip(whole, parts, group, strict=True)
        ]
        return [trunk, *branches]

    def _fields(self, part: PackSequence, positions: Tensor, vision_index: Tensor) -> dict[str, Tensor]:
        """Return the per-token fields of one sequence, aligned with the predicting position."""
        prompt, response = part.inputs.token_ids, part.response_ids
        if bool((response == self.image_token_id).any()):
            raise ValueError("a response has an image placeholder: the rollout engine must never sample one")
        size = part.length
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
        fields = {
            "tokens": torch.cat([prompt, response]),
            "labels": labels,
            "position_ids": positions[:, :size],
            "loss_mask": spread(float(part.in_loss)),
            "task_ids": task_ids,
            "advantages": spread(part.advantage),
            "behaviour_logprobs": spread(0.0 if part.behaviour_logprobs is None else part.behaviour_logprobs),
            "token_weights": spread(part.token_weight * part.in_loss),
            "vision_index": F.pad(vision_index, (0, len(response)), value=-1),
        }
        if part.kept_ids is not None:
            kept = torch.full((part.kept_ids.shape[1], size), -1)
            kept[:, span] = part.kept_ids.t()
            fields["kept_ids"] = kept
        return fields

    def _joined(self, segments: Sequence[dict[str, Tensor]], padded: Sequence[int]) -> dict[str, Tensor]:
        """Return the fields of the row, each segment padded to its size."""
        fills = {"tokens": self.pad_token_id, "labels": NO_LABEL, "task_ids": -1, "vision_index": -1, "kept_ids": -1}
        most = max((len(fields["kept_ids"]) for fields in segments if "kept_ids" in fields), default=0)
        row = {}
        for name in segments[0]:
            values = [
                _padded(fields[name], size, fills.get(name, 0)) for fields, size in zip(segments, padded, strict=True)
            ]
            if name == "kept_ids":
                values = [F.pad(value, (0, 0, 0, most - len(value)), value=-1) for value in values]
            row[name] = torch.cat(values, dim=-1)
        return row

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
            parents=torch.tensor([-1]),
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


@dataclass(frozen=True)
class _Segment:
    """Consecutive tokens of a row that attend to one another.

    Attributes:
        fields: their per-token fields, without padding.
        sequence: index of the packed sequence whose response they hold; -1 for a trunk.
        parent: number of the segment that they continue, in the row; -1 for none.
    """

    fields: dict[str, Tensor]
    sequence: int
    parent: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.fields["tokens"])


def _cut(fields: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[..., start:stop] for name, value in fields.items()}


def _padded(value: Tensor, size: int, fill: int) -> Tensor:
    length = value.shape[-1]
    return value if length == size else F.pad(value, (0, size - length), value=fill)


def _segment_ids(lengths: Sequence[int], padded: Sequence[int]) -> Tensor:
    """Return each token's segment, -1 for padding."""
    runs = [(number, length, size - length) for number, (length, size) in enumerate(zip(lengths, padded, strict=True))]
    values = torch.tensor([value for number, _, _ in runs for value in (number, -1)])
    return values.repeat_interleave(torch.tensor([count for _, *counts in runs for count in counts]))


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def with_advantages(batch: PackedBatch, advantages: Tensor) -> PackedBatch:
    """Return a packed row with the given advantages.

    Args:
        batch: the packed row.
        advantages: advantage of each sequence that was packed, those of other rows included;
            ``PackedBatch.sequence_ids`` says which of them are in this row.
    """
    of_sequence = torch.cat([advantages.float(), torch.zeros(1)])  # the last for sequence -1, of a trunk
    of_segment = torch.cat([of_sequence[batch.sequence_ids], torch.zeros(1)])  # the last for segment -1, padding
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
        if row >= 0
    }
