# SPDX-License-Identifier: Apache-2.0
"""Makes the packed row that a plan assumes: its sizes, and index tensors without meaning."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from megatron_g2rpo import models
from megatron_g2rpo.plan.rows import Row
from megatron_g2rpo.types import NO_LABEL, PackedBatch


def packed_row(row: Row, hf_config: Any, response_tokens: int) -> PackedBatch:
    """Return a packed row of the sizes that a plan assumes, without pixels.

    Every sequence begins with its image's placeholders and ends with its labels, as a prompt and its response do; a
    trunk has only the former, and a branch is all labels. No shape depends on token ids and positions, which are zeros
    and running numbers. Prompts share the images in turn, neighbours the same, as the samples of a group do.

    Args:
        row: sizes of the whole row.
        hf_config: transformers' configuration of the model.
        response_tokens: number of tokens of a response.

    Returns:
        The row; ``pixel_values`` is on the meta device, for the caller to give it the tensors that it works with.
    """
    vision = models.family(hf_config.model_type).vision
    merge, patch_values = 1, 0
    if vision is not None:
        geometry = vision.geometry(hf_config)
        merge, patch_values = geometry.merge, geometry.patch_values
    grids = torch.tensor([_grid(tokens, merge) for tokens in row.images], dtype=torch.int64).reshape(-1, 3)
    first_features = [0, *accumulate(row.images)]
    parts = []
    prompts = [index for index, parent in enumerate(row.parents) if parent < 0]
    for index, (length, padded) in enumerate(zip(row.lengths, row.padded, strict=True)):
        labels, vision_index = torch.full((length,), NO_LABEL), torch.full((length,), -1)
        if row.parents[index] >= 0:
            labels[:] = 0
        elif index not in row.parents:
            answer = min(response_tokens, length)
            last = length - (answer < length)  # the position before a token predicts it
            labels[last - answer : last] = 0
        if row.images and index in prompts:
            image = prompts.index(index) * len(row.images) // len(prompts)
            shown = min(row.images[image], length)
            vision_index[:shown] = first_features[image] + torch.arange(shown)
        fields = (labels, vision_index, torch.full((length,), index), torch.arange(length))
        fills = (NO_LABEL, -1, -1, 0)
        parts.append(
            [F.pad(field, (0, padded - length), value=fill) for field, fill in zip(fields, fills, strict=True)]
        )
    labels, vision_index, segments, positions = (torch.cat(part) for part in zip(*parts, strict=True))
    mask = (labels != NO_LABEL).float()
    return PackedBatch(
        tokens=torch.zeros_like(labels),
        labels=labels,
        position_ids=positions.expand(3, -1).contiguous(),
        segment_ids=segments,
        cu_seqlens=torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32),
        cu_seqlens_padded=torch.tensor([0, *accumulate(row.padded)], dtype=torch.int32),
        parents=torch.tensor(row.parents),
        loss_mask=mask,
        pixel_values=torch.empty(int(grids.prod(dim=1).sum()), patch_values, device="meta"),
        image_grid_thw=grids,
        vision_index=vision_index,
        sequence_ids=torch.tensor([-1 if index in row.parents else index for index in range(len(row.lengths))]),
        task_ids=torch.where(labels != NO_LABEL, 0, -1),
        advantages=mask.clone(),
        behaviour_logprobs=torch.zeros_like(mask),
        token_weights=mask.clone(),
    )


def _grid(tokens: int, merge: int) -> list[int]:
    """Return (time, height, width) in patches of an image of so many merged tokens, as near to a square as they let."""
    side = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return [1, side * merge, tokens // side * merge]
