# SPDX-License-Identifier: Apache-2.0
"""Casts of a share of a weight to FP8 in blocks of 128x128, as the distributed optimizer makes them.

The share is a run of elements of the flattened weight; a block's amax is that of all shares (the caller reduces it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from tests.gpu.te_emulation import scaling


@torch.no_grad()
def fp8_block_scaling_compute_partial_amax(
    tensor: torch.Tensor, amax: torch.Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Write the absolute maximum of the share in each block, 0 where it has no element.

    Args:
        tensor: The share, any shape.
        amax: To write, [blocks down, blocks across] or larger.
        h: Rows of the weight.
        w: Columns of the weight.
        start_offset: Number of the share's first element in the flattened weight.
        block_len: Side of a block.
    """
    found = _blocks(tensor, h, w, start_offset, block_len).abs().amax(3).amax(1)
    amax.zero_()
    amax[: found.shape[0], : found.shape[1]].copy_(found)


@torch.no_grad()
def fp8_block_scaling_partial_cast(
    inp: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int,
    out_dtype: Any,
) -> None:
    """Write the share's bytes, each element by its block's scale; the arguments are as above."""
    blocks = _blocks(inp, h, w, start_offset, block_len)
    down, side, across, _ = blocks.shape
    data = scaling.encode(blocks, scale[:down, :across][:, None, :, None], out_dtype)
    whole = data.view(down * side, across * side)[:h, :w].reshape(-1)
    out.copy_(whole[start_offset : start_offset + inp.numel()].view(out.shape))


def _blocks(share: torch.Tensor, h: int, w: int, start: int, side: int) -> torch.Tensor:
    """Return the weight as [blocks down, side, blocks across, side], 0 where the share has no element."""
    whole = torch.zeros(h * w, dtype=torch.float32, device=share.device)
    whole[start : start + share.numel()] = share.reshape(-1).float()
    down, across = -(-h // side), -(-w // side)
    return pad(whole.view(h, w), (0, across * side - w, 0, down * side - h)).view(down, side, across, side)
