# SPDX-License-Identifier: Apache-2.0
"""Sequences of different lengths, side by side in rows under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.data.positions import rope_positions
from megatron_g2rpo.nouns import NO_LABEL, ModelInputs, PackedBatch


@dataclass(frozen=True, kw_only=True)
class PackSequence:
    """One sequence to pack: a prompt, its response, and what the loss needs to know of it.

    Attributes:
        inputs: the prompt's model inputs; sequences that share this very object share its images.
        response_ids: int64 ``[R]``.
        advantage: of every response token.
        task_id: index of the task.
        rollout_logprobs: float32 ``[R]`` of the rollout engine, or None (supervised training).
        token_weight: weight of every response token in the loss sum.
        in_loss: False keeps the sequence out of the loss (an overlong response).
    """

    inputs: ModelInputs
    response_ids: Tensor
    advantage: float = 0.0
    task_id: int = 0
    rollout_logprobs: Tensor | None = None
    token_weight: float = 1.0
    in_loss: bool = True

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.inputs.token_ids) + len(self.response_ids)


def assign_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit-decreasing bin packing.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens in a bin.

    Returns:
        Sequence numbers of each bin, each bin in ascending order.

    Raises:
        ValueError: a sequence does not fit into an empty bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > budget:
            raise ValueError(
                f"a sequence of {lengths[index]} tokens exceeds the {budget} tokens of a micro-batch; raise "
                "policy.sequence_packing.train_mb_tokens or lower policy.max_total_sequence_length"
            )
        fit = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if fit is None:
            bins.append([])
            room.append(budget)
            fit = len(bins) - 1
        bins[fit].append(index)
        room[fit] -= lengths[index]
    return [sorted(members) for members in bins]


@dataclass(frozen=True)
class Packer:
    """Packs sequences into micro-batches.

    Attributes:
        image_token_id: placeholder whose embedding an image feature replaces.
        spatial_merge_size: vision patches merged per side.
        pad_token_id: the token of a row that holds no sequence.
    """

    image_token_id: int
    spatial_merge_size: int
    pad_token_id: int

    def pack(self, sequences: Sequence[PackSequence], budget: int, num_bins: int | None = None) -> list[PackedBatch]:
        """Rows of at most ``budget`` tokens.

        Args:
            sequences: what to pack.
            budget: tokens of a row.
            num_bins: pad the result with empty rows to this number, so that every data-parallel rank runs the same
                number of micro-batches; None for no padding.

        Raises:
            ValueError: a sequence exceeds the budget, or more than ``num_bins`` rows are needed.
        """
        bins = assign_bins([sequence.length for sequence in sequences], budget)
        if num_bins is not None:
            if len(bins) > num_bins:
                raise ValueError(f"{len(bins)} rows are needed, more than the {num_bins} asked for")
            bins += [[] for _ in range(num_bins - len(bins))]
        return [self._row(sequences, members) if members else self._empty_row(sequences) for members in bins]

    def num_rows(self, sequences: Sequence[PackSequence], budget: int) -> int:
        """Rows that ``pack`` needs."""
        return len(assign_bins([sequence.length for sequence in sequences], budget))

    def _row(self, sequences: Sequence[PackSequence], members: list[int]) -> PackedBatch:
        parts = [sequences[index] for index in members]
        distinct = {id(part.inputs): part.inputs for part in parts}
        first_feature: dict[int, int] = {}
        total = 0
        for key, inputs in distinct.items():
            first_feature[key] = total
            total += self._features(inputs)
        vision_index = [torch.arange(self._features(part.inputs)) + first_feature[id(part.inputs)] for part in parts]
        fields = [self._fields(part) for part in parts]
        lengths = torch.tensor([part.length for part in parts])
        cu_seqlens = torch.zeros(len(parts) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        return PackedBatch(
            **{name: torch.cat([field[name] for field in fields], dim=-1) for name in fields[0]},
            segment_ids=torch.repeat_interleave(torch.arange(len(parts)), lengths),
            cu_seqlens=cu_seqlens,
            pixel_values=torch.cat([inputs.pixel_values for inputs in distinct.values()]),
            image_grid_thw=torch.cat([inputs.image_grid_thw for inputs in distinct.values()]),
            vision_index=torch.cat(vision_index),
            rows=torch.tensor(members),
        )

    def _features(self, inputs: ModelInputs) -> int:
        return int(inputs.image_grid_thw.prod(dim=1).sum()) // self.spatial_merge_size**2

    def _fields(self, part: PackSequence) -> dict[str, Tensor]:
        """Per-token fields of one sequence, aligned with the predicting position."""
        prompt, response = part.inputs.token_ids, part.response_ids
        tokens = torch.cat([prompt, response])
        first = len(prompt) - 1  # the position that predicts the first response token
        span = slice(first, first + len(response))

        def spread(values: Tensor | float) -> Tensor:
            out = torch.zeros(len(tokens))
            out[span] = values
            return out

        # Labels are shifted within the sequence: a roll over the row would wrap its last token to a neighbour.
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:-1] = tokens[1:]
        task_ids = torch.full_like(tokens, -1)
        task_ids[span] = part.task_id
        return {
            "tokens": tokens,
            "labels": labels,
            "position_ids": rope_positions(
                tokens,
                part.inputs.image_grid_thw,
                image_token_id=self.image_token_id,
                spatial_merge_size=self.spatial_merge_size,
            ),
            "loss_mask": spread(float(part.in_loss)),
            "task_ids": task_ids,
            "advantages": spread(part.advantage),
            "rollout_logprobs": spread(0.0 if part.rollout_logprobs is None else part.rollout_logprobs),
            "token_weights": spread(part.token_weight * part.in_loss),
        }

    def _empty_row(self, sequences: Sequence[PackSequence]) -> PackedBatch:
        """One padding token that nothing is learned from."""
        zero = torch.zeros(1)
        patch_dim = sequences[0].inputs.pixel_values.shape[1] if sequences else 0
        return PackedBatch(
            tokens=torch.tensor([self.pad_token_id]),
            labels=torch.tensor([NO_LABEL]),
            position_ids=torch.zeros(3, 1, dtype=torch.int64),
            segment_ids=torch.tensor([-1]),
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
            loss_mask=zero,
            pixel_values=torch.zeros(0, patch_dim),
            image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
            vision_index=torch.zeros(0, dtype=torch.int64),
            rows=torch.zeros(0, dtype=torch.int64),
            task_ids=torch.tensor([-1]),
            advantages=zero,
            rollout_logprobs=zero,
            token_weights=zero,
        )


def response_values(batch: PackedBatch, values: Tensor) -> dict[int, Tensor]:
    """Cut per-token values of a row back into responses.

    Args:
        batch: the row.
        values: ``[S]``, aligned with the predicting position.

    Returns:
        index of the packed sequence -> ``[R]`` values of its response tokens.
    """
    response = batch.task_ids >= 0
    return {
        int(row): values[response & (batch.segment_ids == segment)] for segment, row in enumerate(batch.rows.tolist())
    }
