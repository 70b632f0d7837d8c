# SPDX-License-Identifier: Apache-2.0
"""Packing of sequences of different lengths into rows (micro-batches) under a token budget.

``data.bins`` says which sequences share a row, and when those of a group share a copy of their prompt in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
        return self.prompt_length + self.response_length

    # Asked for again and again while bins are packed, and a tensor is slow to tell.
    @cached_property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return self.inputs.token_ids.size(0)

    @cached_property
    def response_length(self) -> int:
        """Number of tokens of the response."""
        return self.response_ids.size(0)


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
        return self.rows(sequences, self.bins(sequences, budget), num_bins)

    def rows(
        self, sequences: Sequence[PackSequence], bins: Sequence[Sequence[int]], num_bins: int | None = None
    ) -> list[PackedBatch]:
        """Return the rows of sequences that ``bins`` has assigned; see ``pack``.

        Args:
            sequences: the sequences to pack.
            bins: what ``bins`` returned for them.
            num_bins: as for ``pack``.

        Raises:
            ValueError: see ``pack``.
        """
        if num_bins is not None:
            if len(bins) > num_bins:
                raise ValueError(f"{len(bins)} rows are needed, more than the {num_bins} asked for")
            bins = [*bins, *([] for _ in range(num_bins - len(bins)))]
        return [self._row(sequences, members) if members else self._empty_row(sequences) for members in bins]

    def bins(self, sequences: Sequence[PackSequence], budget: int) -> list[list[int]]:
        """Return the indices of the sequences of each row that ``pack`` makes.

        Args:
            sequences: the sequences to pack.
            budget: largest number of tokens of a row.

        Raises:
            ValueError: a sequence exceeds the budget, or a response is empty.
        """
        # Samples that share a prompt or images belong together; others share nothing that a row would pay for twice.
        groups = [
            ("prompt", id(sequence.inputs))
            if self.shared_prefix or len(sequence.inputs.image_grid_thw)
            else ("sequence", index)
            for index, sequence in enumerate(sequences)
        ]
        return assign_bins([self._cost(each) for each in sequences], round_up(budget, self.row_multiple), groups)

    def _cost(self, sequence: PackSequence) -> Cost:
        prompt, response = sequence.prompt_length, sequence.response_length
        if not response:
            raise ValueError("a sequence has no response token, so that nothing of it is predicted: leave it out")
        return Cost.of(prompt, response, self.sequence_multiple, shares=self.shared_prefix)

    def _row(self, sequences: Sequence[PackSequence], members: Sequence[int]) -> PackedBatch:
        kept = sum(sequences[index].kept_ids is not None for index in members)
        if kept not in (0, len(members)):
            raise ValueError(f"of {len(members)} sequences, {kept} say what their tokens were sampled from: all must")
        groups: dict[int, list[int]] = {}
        for index in members:
            groups.setdefault(id(sequences[index].inputs), []).append(index)
        segments: list[_Segment] = []
        for number, group in enumerate(groups.values()):
            segments += self._segments(sequences, group, number, first=len(segments))
        lengths = [segment.length for segment in segments]
        padded = [round_up(length, self.sequence_multiple) for length in lengths]
        padded[-1] += -sum(padded) % self.row_multiple  # the row's own padding follows its last segment
        distinct = [sequences[group[0]].inputs for group in groups.values()]
        positions = [self._positions([sequences[index] for index in group]) for group in groups.values()]
        parts = [sequences[segment.sequence] for segment in segments if segment.sequence >= 0]
        offsets = [0, *accumulate(padded)]
        first = [offsets[number] - segment.start for number, segment in enumerate(segments) if segment.sequence >= 0]
        return PackedBatch(
            **self._of_tokens(segments, offsets, [inputs.token_ids for inputs in distinct], parts, positions),
            **self._of_responses(parts, first, offsets[-1]),
            segment_ids=_segment_ids(lengths, padded),
            cu_seqlens=_offsets(lengths),
            cu_seqlens_padded=_offsets(padded),
            parents=torch.tensor([segment.parent for segment in segments]),
            pixel_values=torch.cat([inputs.pixel_values for inputs in distinct]),
            image_grid_thw=torch.cat([inputs.image_grid_thw for inputs in distinct]),
            sequence_ids=torch.tensor([segment.sequence for segment in segments]),
        )

    def _segments(
        self, sequences: Sequence[PackSequence], group: list[int], number: int, *, first: int
    ) -> list[_Segment]:
        """Return the segments of one prompt's sequences in a row, of which the first has the number ``first``."""
        parts = [sequences[index] for index in group]
        prompt = parts[0].prompt_length

        def segment(part: PackSequence, sequence: int, parent: int, start: int, stop: int) -> _Segment:
            of_prompt = max(prompt - start, 0)
            return _Segment(
                group=number,
                sequence=sequence,
                parent=parent,
                start=start,
                of_prompt=of_prompt,
                of_response=stop - start - of_prompt,
            )

        if not shares_trunk([self._cost(part) for part in parts]):
            return [segment(part, index, -1, 0, part.length) for part, index in zip(parts, group, strict=True)]
        shared = prompt - 1
        trunk = _Segment(group=number, sequence=-1, parent=-1, start=0, of_prompt=shared, of_response=0)
        # A branch ends without the last token, which predicts nothing.
        branches = [
            segment(part, index, first, shared, part.length - 1) for part, index in zip(parts, group, strict=True)
        ]
        return [trunk, *branches]

    def _positions(self, parts: Sequence[PackSequence]) -> Tensor:
        """Return the positions of the longest sequence of a prompt; those of a shorter one are their beginning."""
        inputs, longest = parts[0].inputs, max(parts, key=lambda part: part.response_length)
        return self.positions(
            torch.cat([inputs.token_ids, longest.response_ids]),
            inputs.image_grid_thw,
            image_token_id=self.image_token_id,
            spatial_merge_size=self.spatial_merge_size,
        )

    def _of_tokens(
        self,
        segments: Sequence[_Segment],
        offsets: Sequence[int],
        prompts: Sequence[Tensor],
        parts: Sequence[PackSequence],
        positions: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Return what a row knows of every token.

        Args:
            segments: the row's segments.
            offsets: where each of them begins in the row, and the row's size.
            prompts: the token ids of the distinct prompts.
            parts: the sequences in the order of their responses in the row.
            positions: of each prompt with its longest response.
        """
        # The row takes its tokens from here: from a prompt and a response for each segment. Positions have refused a
        # prompt that has not one placeholder for each feature of its images.
        known = torch.cat([*prompts, *(part.response_ids for part in parts)])
        placeholders = torch.cat(list(prompts)) == self.image_token_id
        vision = torch.full_like(known, -1)
        vision[: len(placeholders)] = torch.where(placeholders, placeholders.cumsum(0) - 1, -1)
        prompt_begins = [0, *accumulate(prompt.size(0) for prompt in prompts)]
        response_begins = accumulate((part.response_length for part in parts), initial=prompt_begins[-1])
        taken: list[tuple[int, int]] = []  # first and count
        for segment in segments:
            taken.append((prompt_begins[segment.group] + segment.start, segment.of_prompt))
            if segment.sequence >= 0:
                taken.append((next(response_begins), segment.of_response))
        source = _runs(*torch.tensor(taken).unbind(1))
        lengths = torch.tensor([segment.length for segment in segments])
        place = _runs(torch.tensor(offsets[:-1]), lengths)
        position_begins = [0, *accumulate(each.size(1) for each in positions)]
        counted = torch.tensor([position_begins[segment.group] + segment.start for segment in segments])

        size = offsets[-1]
        tokens = torch.full((size,), self.pad_token_id)
        position_ids = torch.zeros(3, size, dtype=torch.int64)
        vision_index = torch.full((size,), -1)
        tokens[place] = known[source]
        position_ids[:, place] = torch.cat(list(positions), dim=1)[:, _runs(counted, lengths)]
        vision_index[place] = vision[source]
        return {"tokens": tokens, "position_ids": position_ids, "vision_index": vision_index}

    def _of_responses(self, parts: Sequence[PackSequence], first: Sequence[int], size: int) -> dict[str, Tensor]:
        """Return what a row knows of every response token, at the position that predicts it.

        Args:
            parts: the sequences in the order of their responses in the row.
            first: where the first token of each would lie in the row if its whole prompt did.
            size: number of tokens of the row.
        """
        responses = torch.cat([part.response_ids for part in parts])
        if bool((responses == self.image_token_id).any()):
            raise ValueError("a response has an image placeholder: the rollout engine must never sample one")
        counts = torch.tensor([part.response_length for part in parts])
        # Shifted within the sequence: a roll over the row would wrap its last token to a neighbour. Prompt tokens are
        # no labels: nothing is asked of them, and over a large vocabulary a label is what costs.
        place = _runs(
            torch.tensor([begin + part.prompt_length - 1 for begin, part in zip(first, parts, strict=True)]),
            counts,
        )

        def spread(values: Tensor, fill: int = 0) -> Tensor:
            return torch.full((size,), fill, dtype=values.dtype).index_copy_(0, place, values)

        def constant(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

        fields = {
            "labels": spread(responses, NO_LABEL),
            "loss_mask": spread(constant([float(part.in_loss) for part in parts])),
            "task_ids": spread(torch.tensor([part.task_id for part in parts]).repeat_interleave(counts), -1),
            "advantages": spread(constant([part.advantage for part in parts])),
            "behaviour_logprobs": spread(
                torch.cat(
                    [
                        torch.zeros(part.response_length)
                        if part.behaviour_logprobs is None
                        else part.behaviour_logprobs.float()
                        for part in parts
                    ]
                )
            ),
            "token_weights": spread(constant([part.token_weight * part.in_loss for part in parts])),
        }
        kept = [part.kept_ids for part in parts if part.kept_ids is not None]
        if kept:
            most = max(each.shape[1] for each in kept)
            ids = torch.cat([_padded(each, most, -1) for each in kept])
            fields["kept_ids"] = torch.full((most, size), -1).index_copy_(1, place, ids.t())
        return fields

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


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Consecutive tokens of a row that attend to one another: a sequence, or a part of it.

    Attributes:
        group: number of its prompt in the row.
        sequence: index of the packed sequence whose response they hold; -1 for a trunk.
        parent: number of the segment that they continue, in the row; -1 for none.
        start: number of the sequence's tokens before them, all of the prompt.
        of_prompt: number of its tokens that are the prompt's.
        of_response: number of its tokens that are the response's, of which they are the first.
    """

    group: int
    sequence: int
    parent: int
    start: int
    of_prompt: int
    of_response: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.of_prompt + self.of_response


def _runs(first: Tensor, counts: Tensor) -> Tensor:
    """Return ``first[i], first[i] + 1, ...``, ``counts[i]`` numbers for each i, one after the other."""
    before = counts.cumsum(0) - counts
    return (first - before).repeat_interleave(counts) + torch.arange(int(counts.sum()))


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
    counts = batch.segment_ids[response].bincount(minlength=len(batch.sequence_ids))
    parts = values[response].split(counts.tolist())  # segments lie in the row in the order of their numbers
    return {row: part for row, part in zip(batch.sequence_ids.tolist(), parts, strict=True) if row >= 0}
