# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of FP8: scales from absolute maxima, saturating casts, the update of delayed scaling.

A scale multiplies a high-precision value on its way to FP8; its reciprocal, ``scale_inv``, multiplies an FP8 value on
its way back. Quotients are divisions of two tensors: torch computes ``number / tensor`` as a product with the
reciprocal, which rounds twice and moves a scale by a unit in the last place.
"""

from __future__ import annotations

from typing import Any

import torch

# By the number of DType.
TORCH_DTYPE = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}
MAXIMUM = {7: 448.0, 8: 57344.0}
FP32_MAXIMUM = torch.finfo(torch.float32).max
BLOCK = 128


def encode(x: torch.Tensor, scale: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Return the bytes of ``x * scale`` (a product in fp32) in FP8; it saturates, NaN stays NaN."""
    limit = MAXIMUM[int(dtype)]
    return (x.float() * scale).clamp(-limit, limit).to(TORCH_DTYPE[int(dtype)]).view(torch.uint8)


def decode(data: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Return the fp32 values of FP8 bytes, without a scale."""
    return data.contiguous().view(TORCH_DTYPE[int(dtype)]).float()


def largest(x: torch.Tensor) -> torch.Tensor:
    """Return the absolute maximum of a tensor, fp32 [1]."""
    return x.abs().amax().float().reshape(1)


def scale_from_amax(
    amax: torch.Tensor, dtype: Any, *, power_of_2: bool, epsilon: float, when_infinite: float = FP32_MAXIMUM
) -> torch.Tensor:
    """Return ``maximum of dtype / amax`` per element of ``amax``, fp32.

    It is 1 where amax is 0 or not finite, ``when_infinite`` where the quotient overflows, and with ``power_of_2`` its
    mantissa is cut off, so that it is the next power of two below.
    """
    amax = torch.where(amax < epsilon, torch.full_like(amax, epsilon), amax)
    scale = torch.full_like(amax, MAXIMUM[int(dtype)]) / amax
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, when_infinite), scale)
    if power_of_2:
        exponent = torch.full_like(scale, -0x800000, dtype=torch.int32)  # the mask of sign and exponent
        scale = (scale.view(torch.int32) & exponent).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax != 0), scale, torch.ones_like(scale))


def delayed_scale(amax: torch.Tensor, scale: torch.Tensor, dtype: Any, margin: float) -> torch.Tensor:
    """Return ``maximum * 2^-margin / amax``; the old scale where amax is 0 or not finite."""
    top = MAXIMUM[int(dtype)] * 2.0 ** -float(margin)
    new = torch.where(torch.isfinite(amax) & (amax > 0), torch.full_like(amax, top) / amax, scale)
    return torch.where(torch.isinf(new), torch.full_like(new, FP32_MAXIMUM), new)


def rolled(history: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the history with its oldest row gone, and the largest amax of that window.

    Args:
        history: [length, slots]; row 0 collects the amaxes of the step that is under way, the last row is the newest of
            the finished ones.
        newest: [slots], the amaxes of the step that ends.

    Returns:
        The history, with an empty row 0, and the maxima [slots].
    """
    window = torch.cat([history[1:], newest[None]])
    empty = torch.zeros_like(window[:1])
    return torch.cat([empty, window[1:]]), window.amax(0)


@torch.no_grad()
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: torch.Tensor | None,
    amax_histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling at the end of a step: every slot's history moves on and its scale follows, in place.

    Args:
        amax_reduction_buffer: The newest amaxes of all slots, after their reduction over ranks, [sum of slots].
        amax_histories: [length, slots] each.
        scales: [slots] each.
        amax_compute_algo: "max" over the history, or "most_recent".
        fp8_dtype: The DType whose maximum counts.
        margin: How many powers of two a scale stays below the maximum.

    A slot whose newest amax is 0 (it was not used since the last update) keeps its history and its scale.
    """
    at = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        slots = scale.numel()
        newest = history[0]
        if amax_reduction_buffer is not None and amax_reduction_buffer.numel():
            reduced = amax_reduction_buffer[at : at + slots]
            newest = torch.where(reduced != 0, reduced, newest)
        at += slots
        moved, maximum = rolled(history, newest)
        used = newest != 0
        amax = torch.where(used, newest if amax_compute_algo == "most_recent" else maximum, torch.zeros_like(newest))
        scale.copy_(delayed_scale(amax, scale, fp8_dtype, margin))
        history.copy_(torch.where(used, moved, history))


@torch.no_grad()
def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    """Write the absolute maximum of a tensor into ``amax``, fp32 [1]."""
    amax.copy_(largest(input).reshape(amax.shape))


@torch.no_grad()
def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    max_fp8: float,
    force_pow_2_scales: bool,
    epsilon: float,
) -> None:
    """Current scaling of many tensors: amaxes in, scales and their reciprocals out (lists of [1] tensors)."""
    dtype = next(number for number, maximum in MAXIMUM.items() if maximum == max_fp8)
    for amax, scale, scale_inv in zip(*tensor_lists, strict=True):
        scale.copy_(scale_from_amax(amax, dtype, power_of_2=force_pow_2_scales, epsilon=epsilon))
        scale_inv.copy_(scale.reciprocal())


def _tiles_of(length: int, start_offset: int, w: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return the number of the tile of each element of a flat shard of a weight [h, w], int64 [length]."""
    at = torch.arange(start_offset, start_offset + length, device=device)
    return at // w // BLOCK * columns + at % w // BLOCK


def _check_block(block_len: int) -> None:
    if block_len != BLOCK:
        raise RuntimeError("Currently only block_len = 128 is supported")


@torch.no_grad()
def fp8_block_scaling_compute_partial_amax(
    tensor: torch.Tensor, amax: torch.Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Write the amax of each 128x128 tile of a weight [h, w] as far as a flat shard of it reaches.

    ``tensor`` [n] is the shard, which starts at element ``start_offset``; ``amax`` is [h / 128, w / 128], rounded up.
    """
    _check_block(block_len)
    tiles = _tiles_of(tensor.numel(), start_offset, w, amax.shape[1], tensor.device)
    found = torch.zeros(amax.numel(), dtype=torch.float32, device=amax.device)
    found.scatter_reduce_(0, tiles, tensor.abs().float().reshape(-1), "amax")
    amax.copy_(found.view(amax.shape))


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
    """Cast a flat shard of a weight [h, w] to FP8 bytes with the scale of each element's 128x128 tile."""
    _check_block(block_len)
    tiles = _tiles_of(inp.numel(), start_offset, w, scale.shape[1], inp.device)
    out.copy_(encode(inp.reshape(-1), scale.reshape(-1)[tiles], out_dtype).view(out.shape))
