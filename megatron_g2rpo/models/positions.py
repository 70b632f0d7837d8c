# SPDX-License-Identifier: Apache-2.0
"""Positions of the tokens of one sequence: counted for text, spread over a grid for images (mRoPE)."""

from __future__ import annotations

import torch
from torch import Tensor


def text_positions(length: int, first: int = 0) -> Tensor:
    """Return the positions of text, equal on all three axes: int64 ``[3, length]``.

    Args:
        length: number of tokens.
        first: position of the first token.
    """
    return (torch.arange(length) + first).expand(3, -1)


def mrope_positions(
    token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
) -> Tensor:
    """Return the time, height and width position of every token of one sequence, as Qwen-VL models count them.

    Text advances all three axes by one a token. An image of t x h x w patches spreads its merged grid over the axes,
    all starting at the position reached; the text after it continues at that position plus the grid's largest side.
    Source: ``Qwen3VLModel.get_rope_index`` of transformers.

    Args:
        token_ids: int64 ``[P]``, placeholders expanded.
        image_grid_thw: int64 ``[I, 3]``, in patches before merging.
        image_token_id: id of the image placeholder.
        spatial_merge_size: patches merged per side.

    Returns:
        int64 ``[3, P]``.

    Raises:
        ValueError: the placeholders do not match the images.
    """
    placeholders = token_ids == image_token_id
    grids = image_grid_thw.tolist()
    sizes = [t * (h // spatial_merge_size) * (w // spatial_merge_size) for t, h, w in grids]
    if sum(sizes) != int(placeholders.sum()):
        raise ValueError(
            f"{int(placeholders.sum())} image placeholders, but the images have {sum(sizes)} merged patches"
        )
    where = placeholders.nonzero().squeeze(1).tolist()
    pieces: list[Tensor] = []
    position = cursor = used = 0
    for (frames, height, width), size in zip(grids, sizes, strict=True):
        start = where[used]
        if where[used + size - 1] != start + size - 1:
            raise ValueError(f"the {size} placeholders of an image must be consecutive; they start at token {start}")
        pieces.append(text_positions(start - cursor, position))
        position += start - cursor
        merged = (frames, height // spatial_merge_size, width // spatial_merge_size)
        grid = torch.meshgrid(*(torch.arange(length) for length in merged), indexing="ij")
        pieces.append(torch.stack(grid).reshape(3, -1) + position)
        position += max(merged[1], merged[2])
        cursor, used = start + size, used + size
    pieces.append(text_positions(len(token_ids) - cursor, position))
    return torch.cat(pieces, dim=1)
