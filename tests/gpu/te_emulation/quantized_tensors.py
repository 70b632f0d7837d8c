# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's FP8 tensors: how they are allocated, and what they hold for each side of a GEMM.

A tensor with one scale (delayed and current scaling) holds ``_data`` [.., K] and, for the other side of a GEMM on
Hopper, ``_transpose`` [K, ..]: the same bytes. A block-scaled one holds ``_rowwise_data`` with a scale for each 1x128
block along K (or each 128x128 tile), and ``_columnwise_data``, the transposed tensor quantised by itself. Scales of
1x128 blocks lie [blocks, rows rounded up to 4], those of tiles [row tiles, column tiles rounded up to 4].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.gpu.te_emulation import scaling

_FAMILIES = {
    "Float8Quantizer": "delayed",
    "Float8CurrentScalingQuantizer": "current",
    "Float8BlockQuantizer": "block",
}


def family(quantizer: Any) -> str:
    """Return "delayed", "current" or "block".

    Raises:
        NotImplementedError: A quantizer that is not emulated, by its name. Hopper has no other: MXFP8 and NVFP4 start
            with Blackwell.
    """
    name = type(quantizer).__name__
    if name not in _FAMILIES:
        raise NotImplementedError(f"{name} is not emulated: only {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def transposed_shape(shape: Sequence[int]) -> list[int]:
    """Return [K, ..] of [.., K]."""
    return [shape[-1], *shape[:-1]] if len(shape) else []


def transposed(data: torch.Tensor) -> torch.Tensor:
    """Return [K, ..] of [.., K], contiguous."""
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(transposed_shape(data.shape))


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """Return an unfilled tensor of the quantizer's class, with the buffers that its usages ask for.

    ``quantizer.internal`` chooses the class without autograd (``..Storage``). ``dtype`` is what the tensor claims to
    be.
    """
    shape, device = list(shape), torch.device(device)

    def bytes_(of: Sequence[int], wanted: bool) -> torch.Tensor | None:
        return torch.empty(list(of), dtype=torch.uint8, device=device, pin_memory=pin_memory) if wanted else None

    make = _empty_blocks if family(quantizer) == "block" else _empty_per_tensor
    plain, full, parts = make(quantizer, shape, device, bytes_)
    if quantizer.internal:
        return plain(**parts, fake_dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return full(shape=shape, stride=stride, dtype=dtype, device=device, **parts)


def _empty_per_tensor(
    quantizer: Any, shape: list[int], device: torch.device, bytes_: Any
) -> tuple[Any, Any, dict[str, Any]]:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    parts = {
        "data": bytes_(shape, quantizer.rowwise_usage),
        "data_transpose": bytes_(transposed_shape(shape), quantizer.columnwise_usage),
        "fp8_scale_inv": torch.empty([1], dtype=torch.float32, device=device),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    return Float8TensorStorage, Float8Tensor, parts


def _empty_blocks(
    quantizer: Any, shape: list[int], device: torch.device, bytes_: Any
) -> tuple[Any, Any, dict[str, Any]]:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
    parts = {
        "rowwise_data": bytes_(shape, row),
        "rowwise_scale_inv": _block_scales(quantizer, shape, False, device) if row else None,
        "columnwise_data": bytes_(transposed_shape(shape), column),
        "columnwise_scale_inv": _block_scales(quantizer, shape, True, device) if column else None,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": quantizer.block_scaling_dim == 2,
    }
    return Float8BlockwiseQTensorStorage, Float8BlockwiseQTensor, parts


def _block_scales(quantizer: Any, shape: list[int], columnwise: bool, device: torch.device) -> torch.Tensor:
    return torch.zeros(tuple(quantizer.get_scale_shape(shape, columnwise)), dtype=torch.float32, device=device)


def fit(quantizer: Any, tensor: Any) -> Any:
    """Give an existing tensor the buffers that the quantizer's usages ask for, and take those that they do not."""
    shape, device = list(tensor.size()), tensor.device
    sides = (
        (quantizer.rowwise_usage, "rowwise", "_data", shape),
        (quantizer.columnwise_usage, "columnwise", "_transpose", transposed_shape(shape)),
    )
    blocks = family(quantizer) == "block"
    for wanted, side, of_one_scale, of in sides:
        name = f"_{side}_data" if blocks else of_one_scale
        if not wanted:
            setattr(tensor, name, None)
        elif getattr(tensor, name) is None:
            setattr(tensor, name, torch.empty(of, dtype=torch.uint8, device=device))
        if blocks:
            scales = f"_{side}_scale_inv"
            if not wanted:
                setattr(tensor, scales, None)
            elif getattr(tensor, scales) is None:
                setattr(tensor, scales, _block_scales(quantizer, shape, side == "columnwise", device))
    if not blocks:
        tensor._transpose_invalid = not quantizer.columnwise_usage
        tensor._fp8_dtype = quantizer.dtype
    return tensor


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor is one of Transformer Engine's FP8 tensors."""
    return hasattr(tensor, "_fp8_dtype")


def operand(tensor: Any, *, columnwise: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a GEMM reads of a tensor, [rows, K], and the scale that is still to be multiplied with the product.

    Values of FP8 tensors are fp32. ``columnwise`` reads the buffer of the transposed tensor and turns it back.

    Raises:
        RuntimeError: The buffer is not there (Hopper's FP8 GEMM cannot transpose an operand by itself).
    """
    if not is_quantized(tensor):
        return tensor.reshape(-1, tensor.shape[-1]), None
    if hasattr(tensor, "_scale_inv"):
        data = tensor._transpose if columnwise else tensor._data
        if data is None or (columnwise and tensor._transpose_invalid):
            side = "column" if columnwise else "row"
            raise RuntimeError(f"FP8 GEMM on Hopper is TN only: this operand has no {side}-wise data")
        values = scaling.decode(_matrix(data, columnwise), tensor._fp8_dtype)
        return (values.t() if columnwise else values), tensor._scale_inv
    side = "columnwise" if columnwise else "rowwise"
    data, scale_inv = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv")
    if data is None:
        raise RuntimeError(f"FP8 GEMM of blocks: this operand has no {side} data")
    values = scaling.decode(_matrix(data, columnwise), tensor._fp8_dtype)
    values = values * _scales_of_elements(scale_inv, *values.shape, tiles=tensor._is_2D_scaled)
    return (values.t() if columnwise else values), None


def _matrix(data: torch.Tensor, columnwise: bool) -> torch.Tensor:
    return data.reshape(data.shape[0], -1) if columnwise else data.reshape(-1, data.shape[-1])


def _scales_of_elements(scale_inv: torch.Tensor, rows: int, columns: int, *, tiles: bool) -> torch.Tensor:
    by_row = scale_inv.repeat_interleave(scaling.BLOCK, 0)[:rows] if tiles else scale_inv[:, :rows].t()
    return by_row.repeat_interleave(scaling.BLOCK, 1)[:, :columns]
