# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in one kernel: ``x * cos + rotate_half(x) * sin`` in fp32, rounded once.

Angles (``freqs``) are fp32 [positions, 1, 1, rotated width]; the rest of a head's width passes through. Half of a width
is rotated against the other half, or, interleaved, even against odd elements.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.te_emulation.enums import NVTE_QKV_Format


@torch.no_grad()
def fused_rope_forward(
    input: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Return the rotated input: [s, b, h, d] ("sbhd"), [b, s, h, d] ("bshd") or [t, h, d] ("thd").

    Args:
        input: Queries or keys of this rank.
        freqs: The angle of each position of a whole sequence; in "thd" every sequence starts at the first.
        start_positions: Added to the positions of sequence i, [b].
        qkv_format: The NVTE_QKV_Format of ``input``.
        interleaved: Rotate even against odd elements.
        cu_seqlens: In "thd", where the sequences of all ranks begin, [b + 1].
        cp_size: Context-parallel ranks; this one holds chunks ``cp_rank`` and ``2 * cp_size - 1 - cp_rank``.
        cp_rank: The rank's number.
    """
    angles = _angles(input, freqs, start_positions, qkv_format, cu_seqlens, cp_size, cp_rank)
    width = angles.shape[-1]
    x = input.float()
    rotated = x[..., :width] * angles.cos() + _rotate_half(x[..., :width], interleaved) * angles.sin()
    return torch.cat([rotated, x[..., width:]], -1).to(input.dtype)


@torch.no_grad()
def fused_rope_backward(
    output_grads: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Return the gradient of the input: the transpose of the forward pass, whose arguments it takes."""
    angles = _angles(output_grads, freqs, start_positions, qkv_format, cu_seqlens, cp_size, cp_rank)
    width = angles.shape[-1]
    g = output_grads.float()
    turned = g[..., :width] * angles.cos() - _rotate_half(g[..., :width] * angles.sin(), interleaved)
    return torch.cat([turned, g[..., width:]], -1).to(output_grads.dtype)


def _rotate_half(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return (-second, first) of each pair. Its transpose is its negative."""
    if not interleaved:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _angles(
    x: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: Any,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Return the angles of every token, to be broadcast against ``x``."""
    if freqs.dim() != 4 or freqs.shape[1] != 1 or freqs.shape[2] != 1:
        raise RuntimeError(f"expected the second and third dims of the freqs tensor equal 1, got {list(freqs.shape)}")
    if freqs.dtype != torch.float32:
        raise RuntimeError(f"Dtype of the freqs tensor must be float, got {freqs.dtype}")
    if x.shape[-1] < freqs.shape[-1]:
        raise RuntimeError(f"the angles' width {freqs.shape[-1]} exceeds that of a head, {x.shape[-1]}")
    table = freqs[:, 0, 0]
    starts = [] if start_positions is None else start_positions.tolist()
    if qkv_format == NVTE_QKV_Format.NVTE_THD:
        if cu_seqlens is None or x.dim() != 3:
            raise RuntimeError("expected cu_seqlens tensor and 3D tensor")
        lengths = (cu_seqlens.diff() // cp_size).tolist()
        starts = starts or [0] * len(lengths)
        positions = [_positions(n, at, cp_size, cp_rank) for n, at in zip(lengths, starts, strict=True)]
        return table[torch.cat(positions).to(table.device)][:, None]
    sequence = 0 if qkv_format == NVTE_QKV_Format.NVTE_SBHD else 1
    length, batch = x.shape[sequence], x.shape[1 - sequence]
    if length * cp_size > freqs.shape[0]:
        raise RuntimeError("expected freqs tensor has a longer sequence length than input")
    rows = [_positions(length, at, cp_size, cp_rank) for at in starts or [0] * batch]
    return table[torch.stack(rows, 1 - sequence).to(table.device)][:, :, None]


def _positions(length: int, start: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions of a rank's ``length`` tokens of one sequence."""
    if cp_size == 1:
        return torch.arange(length) + start
    if length % 2:
        raise RuntimeError(f"context parallelism needs an even number of tokens of each sequence, got {length}")
    half = length // 2
    chunks = (cp_rank, 2 * cp_size - 1 - cp_rank)
    return torch.cat([torch.arange(half) + chunk * half for chunk in chunks]) + start
