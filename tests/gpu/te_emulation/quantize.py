# SPDX-License-Identifier: Apache-2.0
"""Quantisation into Transformer Engine's FP8 tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from tests.gpu.te_emulation import quantized_tensors, scaling
from tests.gpu.te_emulation.scaling import BLOCK


@torch.no_grad()
def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """Return a tensor in FP8: a new one, or ``output`` refilled in place (a cached weight).

    A ``noop`` flag [1] of 1 leaves the output as it is.
    """
    x = tensor.detach().contiguous()
    if output is None:
        out = quantized_tensors.create_empty_quantized_tensor(quantizer, x.shape, x.dtype, x.device, False)
    else:
        out = quantized_tensors.fit(quantizer, output)
    if x.numel() and not (noop is not None and float(noop.float().reshape(-1)[0]) == 1.0):
        fill(quantizer, out, x)
    return out


@torch.no_grad()
def fill(quantizer: Any, out: Any, x: torch.Tensor, amax: torch.Tensor | None = None) -> None:
    """Write a high-precision tensor into the buffers of an FP8 tensor.

    Delayed scaling uses the scale that it has and notes the amax for the next update; it never forgets a larger one of
    the same step. Current scaling takes its scale from the amax, the largest one of the group where the quantizer
    reduces it.

    Args:
        quantizer: What says how.
        out: The FP8 tensor.
        x: fp32, bf16 or fp16, [.., K].
        amax: The absolute maximum where the caller has it already (a norm computes it from its unrounded output).

    Raises:
        NotImplementedError: Only column-wise data of a tensor with one scale is asked for, as in the extension.
    """
    kind = quantized_tensors.family(quantizer)
    if kind == "block":
        write = _fill_tiles if quantizer.block_scaling_dim == 2 else _fill_blocks
        write(quantizer, out, x)
        return
    if out._data is None and out._transpose is not None:
        raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented")
    if kind == "delayed":
        if quantizer.amax.numel():  # a cast with a scale that is known already brings an empty tensor
            quantizer.amax.copy_(noted(quantizer.amax, x))
        scale = quantizer.scale
    else:
        amax = scaling.largest(x) if amax is None else amax
        if quantizer.with_amax_reduction:
            reduce_amax(amax, quantizer._canonicalized_amax_reduction_group())
        scale = scaling.scale_from_amax(
            amax, quantizer.dtype, power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon
        )
    data = scaling.encode(x, scale, quantizer.dtype)
    out._scale_inv.copy_(scale.reciprocal().reshape(out._scale_inv.shape))
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(quantized_tensors.transposed(data).view(out._transpose.shape))


def noted(amax: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the amax of a step after one more tensor of it, in the shape of ``amax``."""
    return torch.maximum(amax, scaling.largest(x).reshape(amax.shape))


def reduce_amax(amax: torch.Tensor, group: Any) -> None:
    """Take the largest amax of a group's ranks, in place."""
    dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)


def _scales(quantizer: Any, amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scaling.scale_from_amax(
        amax,
        quantizer.dtype,
        power_of_2=quantizer.force_pow_2_scales,
        epsilon=quantizer.amax_epsilon,
        when_infinite=torch.finfo(dtype).max,
    )


def _fill_blocks(quantizer: Any, out: Any, x: torch.Tensor) -> None:
    """Blocks of 1x128: the transposed tensor has blocks, and so scales, of its own."""
    matrix = x.reshape(-1, x.shape[-1])
    if out._rowwise_data is not None:
        _write_blocks(quantizer, matrix, out._rowwise_data, out._rowwise_scale_inv)
    if out._columnwise_data is not None:
        _write_blocks(quantizer, matrix.t().contiguous(), out._columnwise_data, out._columnwise_scale_inv)


def _write_blocks(quantizer: Any, matrix: torch.Tensor, data: torch.Tensor, scale_inv: torch.Tensor) -> None:
    rows, columns = matrix.shape
    count = -(-columns // BLOCK)
    blocks = pad(matrix.float(), (0, count * BLOCK - columns)).view(rows, count, BLOCK)
    scale = _scales(quantizer, blocks.abs().amax(-1), matrix.dtype)
    encoded = scaling.encode(blocks, scale[..., None], quantizer.dtype).view(rows, count * BLOCK)
    data.copy_(encoded[:, :columns].reshape(data.shape))
    scale_inv.zero_()
    scale_inv[:, :rows].copy_(scale.reciprocal().t())


def _fill_tiles(quantizer: Any, out: Any, x: torch.Tensor) -> None:
    """Tiles of 128x128: the same bytes and scales for both sides, turned."""
    matrix = x.reshape(-1, x.shape[-1])
    rows, columns = matrix.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = pad(matrix.float(), (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    tiles = padded.view(down, BLOCK, across, BLOCK)
    scale = _scales(quantizer, tiles.abs().amax(3).amax(1), x.dtype)
    encoded = scaling.encode(tiles, scale[:, None, :, None], quantizer.dtype).view(padded.shape)[:rows, :columns]
    for side, data, scales in (("rowwise", encoded, scale), ("columnwise", encoded.t(), scale.t())):
        buffer, scale_inv = getattr(out, f"_{side}_data"), getattr(out, f"_{side}_scale_inv")
        if buffer is not None:
            buffer.copy_(data.contiguous().view(buffer.shape))
            scale_inv.zero_()
            scale_inv[:, : scales.shape[1]].copy_(scales.reciprocal())


@torch.no_grad()
def dequantize(input: Any, otype: Any) -> torch.Tensor:
    """Return an FP8 tensor in high precision (``otype``), from its row-wise data."""
    values, scale_inv = quantized_tensors.operand(input, columnwise=False)
    values = values if scale_inv is None else values * scale_inv
    return values.to(scaling.TORCH_DTYPE[int(otype)]).view(input.size())


@torch.no_grad()
def bgrad_quantize(input: torch.Tensor, quantizer: Any) -> list[Any]:
    """Return the bias gradient of an output gradient [.., N], which is its sum over tokens, and the gradient in FP8."""
    gradient = input.contiguous()
    bias_gradient = gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype)
    return [bias_gradient, gradient if quantizer is None else quantize(gradient, quantizer)]


def multi_tensor_quantize(tensor_list: Sequence[torch.Tensor], quantizer_list: Sequence[Any]) -> list[Any]:
    """Quantise each tensor by the quantizer of the same place."""
    return [quantize(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)]


def split_quantize(
    tensor: torch.Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Cut a tensor [rows, K] into consecutive sections of rows and quantise each (one section for each expert)."""
    return multi_tensor_quantize(tensor.split(list(split_sections)), quantizer_list)


@torch.no_grad()
def fp8_transpose(input: torch.Tensor, dtype: Any, *, out: torch.Tensor | None) -> torch.Tensor:
    """Return FP8 bytes [.., K] as [K, ..]."""
    result = quantized_tensors.transposed(input)
    if out is None:
        return result
    out.copy_(result.view(out.shape))
    return out


@torch.no_grad()
def swap_first_dims(tensor: torch.Tensor, *, out: torch.Tensor | None) -> torch.Tensor:
    """Return [a, b, ..] as [b, a, ..], contiguous: gathered column-wise blocks become those of the whole tensor."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)
