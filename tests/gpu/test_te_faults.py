# SPDX-License-Identifier: Apache-2.0
"""Faults that an emulation of Transformer Engine's kernels could have: each makes a check of this folder fail.

So the checks tell a right kernel from a wrong one. A fault replaces one function or number of the emulation; the check
that has to see it is named beside it, and passes without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.gpu import te_attention_checks, te_checks, te_optimizer_checks
from tests.gpu.devices import needs_transformer_engine, needs_virtual
from tests.gpu.te_emulation import attention, context_parallel, gemm, optimizers, quantize, rope, scaling

pytestmark = [needs_virtual, needs_transformer_engine]

Patch = pytest.MonkeyPatch
BF16, FP32 = torch.bfloat16, torch.float32
DELAYED_SCALES = partial(te_checks.check_delayed_scales, 6, length=3)
BLOCKWISE = partial(te_checks.check_fp8_linear, "blockwise", FP32, 2)
CURRENT = partial(te_checks.check_fp8_linear, "current", FP32, 2)


def wrong_e5m2_maximum(patch: Patch) -> None:
    """A power of two, which no product shows: only the scales do."""
    patch.setitem(scaling.MAXIMUM, 8, 448.0)


def uncleared_history_row(patch: Patch) -> None:
    real = scaling.rolled

    def rolled(history: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moved, maximum = real(history, newest)
        moved[0] = history[1 % len(history)] if len(history) > 1 else newest
        return moved, maximum

    patch.setattr(scaling, "rolled", rolled)


def reciprocal_for_a_division(patch: Patch) -> None:
    def delayed_scale(amax: torch.Tensor, scale: torch.Tensor, dtype: Any, margin: float) -> torch.Tensor:
        return torch.where(amax > 0, amax.reciprocal() * scaling.MAXIMUM[int(dtype)] * 2.0**-margin, scale)

    patch.setattr(scaling, "delayed_scale", delayed_scale)


def amax_of_the_last_tensor_only(patch: Patch) -> None:
    patch.setattr(quantize, "noted", lambda amax, x: scaling.largest(x).reshape(amax.shape))


def columns_from_the_rows_bytes(patch: Patch) -> None:
    """The columns' buffer holds what the rows were rounded to, quantised once more."""

    def fill_blocks(quantizer: Any, out: Any, x: torch.Tensor) -> None:
        matrix = x.reshape(-1, x.shape[-1])
        quantize._write_blocks(quantizer, matrix, out._rowwise_data, out._rowwise_scale_inv)
        scales = out._rowwise_scale_inv[:, : len(matrix)].t().repeat_interleave(128, 1)[:, : matrix.shape[1]]
        rounded = scaling.decode(out._rowwise_data, quantizer.dtype).view(matrix.shape) * scales
        quantize._write_blocks(quantizer, rounded.t().contiguous(), out._columnwise_data, out._columnwise_scale_inv)

    patch.setattr(quantize, "_fill_blocks", fill_blocks)


def stale_cached_weight(patch: Patch) -> None:
    """A buffer that was filled once stays as it is. They are kept here, so that none is another's memory."""
    real = quantize.fill
    buffers: dict[int, torch.Tensor] = {}

    def fill(quantizer: Any, out: Any, x: torch.Tensor, amax: torch.Tensor | None = None) -> None:
        if out._data.data_ptr() not in buffers:
            real(quantizer, out, x, amax)
        buffers[out._data.data_ptr()] = out._data

    patch.setattr(quantize, "fill", fill)


def missing_clamp(patch: Patch) -> None:
    def encode(x: torch.Tensor, scale: torch.Tensor, dtype: Any) -> torch.Tensor:
        return (x.float() * scale).to(scaling.TORCH_DTYPE[int(dtype)]).view(torch.uint8)

    patch.setattr(scaling, "encode", encode)


def scale_of_a_block_rounded_to_nearest(patch: Patch) -> None:
    real = scaling.scale_from_amax

    def scale_from_amax(amax: torch.Tensor, dtype: Any, *, power_of_2: bool, **options: Any) -> torch.Tensor:
        exact = real(amax, dtype, power_of_2=False, **options)
        return exact.log2().round().exp2() if power_of_2 else exact

    patch.setattr(scaling, "scale_from_amax", scale_from_amax)


def current_scale_of_another_format(patch: Patch) -> None:
    """A scale that is no power of two off: half of the range is lost, or cut."""
    real = scaling.scale_from_amax
    patch.setattr(scaling, "scale_from_amax", lambda amax, dtype, **options: real(amax * 0.7, dtype, **options))


def gradient_not_accumulated(patch: Patch) -> None:
    real = gemm._write
    patch.setattr(gemm, "_write", lambda D, y, dtype, accumulate, beta: real(D, y, dtype, False, beta))


def bias_gradient_of_the_rounded_gradient(patch: Patch) -> None:
    real = quantize.bgrad_quantize

    def bgrad_quantize(input: torch.Tensor, quantizer: Any) -> list[Any]:
        bias_gradient, quantised = real(input, quantizer)
        return [bias_gradient * 0 + quantize.dequantize(quantised, 6).float().sum(0).to(input.dtype), quantised]

    import transformer_engine_torch

    patch.setattr(transformer_engine_torch, "bgrad_quantize", bgrad_quantize)


def softmax_without_its_scale(patch: Patch) -> None:
    real = attention._Softmax.scores
    patch.setattr(attention._Softmax, "scores", lambda self, q, k: real(self, q, k) / self.scale)


def causal_mask_one_off(patch: Patch) -> None:
    real = attention._Softmax._attended
    patch.setattr(
        attention._Softmax, "_attended", lambda self, *shape: real(self, *shape).roll(1, -1) | real(self, *shape)
    )


def sequences_by_their_padded_offsets(patch: Patch) -> None:
    """Padding between sequences is attended."""
    real = attention._Sequences.of

    def of(format_: str, cu_seqlens: Any, padded: Any, mask: Any, like: Any) -> Any:
        return real(format_, cu_seqlens if padded is None else padded, padded, mask, like)

    patch.setattr(attention._Sequences, "of", of)


def dropout_drawn_anew_in_the_backward_pass(patch: Patch) -> None:
    real = attention._Softmax.kept
    seeds = iter(range(1000))
    patch.setattr(attention._Softmax, "kept", lambda self, like, seed: real(self, like, seed + next(seeds)))


def parts_merged_without_the_old_statistics(patch: Patch) -> None:
    real = context_parallel._per_token

    def per_token(lse: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return real(lse, *arguments, **keywords) * (1.0 if keywords["whole"] else 0.9)

    patch.setattr(context_parallel, "_per_token", per_token)


def halves_exchanged(patch: Patch) -> None:
    real = context_parallel._half
    patch.setattr(context_parallel, "_half", lambda cu_seqlens, *, second: real(cu_seqlens, second=not second))


def rotation_turned_the_wrong_way_in_the_backward_pass(patch: Patch) -> None:
    import transformer_engine_torch

    patch.setattr(transformer_engine_torch, "fused_rope_backward", rope.fused_rope_forward)


def weight_decay_in_the_gradient(patch: Patch) -> None:
    real = optimizers.multi_tensor_adam

    def adam(*arguments: Any) -> None:
        real(*arguments[:8], 0, *arguments[9:])

    import transformer_engine_torch

    patch.setattr(transformer_engine_torch, "multi_tensor_adam", adam)


def main_copy_not_written_back(patch: Patch) -> None:
    real = optimizers.multi_tensor_adam

    def adam(*arguments: Any) -> None:
        parameters = [parameter.clone() for parameter in arguments[2][1]]
        real(*arguments)
        if len(arguments[2]) > 4:
            for parameter, old in zip(arguments[2][1], parameters, strict=True):
                parameter.copy_(old)

    import transformer_engine_torch

    patch.setattr(transformer_engine_torch, "multi_tensor_adam", adam)


FAULTS: dict[Callable[[Patch], None], Callable[[], Any]] = {
    wrong_e5m2_maximum: DELAYED_SCALES,
    uncleared_history_row: DELAYED_SCALES,
    reciprocal_for_a_division: partial(te_checks.check_delayed_scales, 20, length=1, algorithm="most_recent"),
    amax_of_the_last_tensor_only: DELAYED_SCALES,
    columns_from_the_rows_bytes: BLOCKWISE,
    stale_cached_weight: partial(te_checks.check_weight_cache, "current"),
    missing_clamp: te_checks.check_saturation,
    scale_of_a_block_rounded_to_nearest: BLOCKWISE,
    current_scale_of_another_format: CURRENT,
    gradient_not_accumulated: te_checks.check_accumulation,
    bias_gradient_of_the_rounded_gradient: CURRENT,
    softmax_without_its_scale: partial(te_attention_checks.check_packed, BF16, padded=False),
    causal_mask_one_off: partial(te_attention_checks.check_packed, BF16, padded=False),
    sequences_by_their_padded_offsets: partial(te_attention_checks.check_packed, BF16, padded=True),
    dropout_drawn_anew_in_the_backward_pass: te_attention_checks.check_dropout,
    parts_merged_without_the_old_statistics: te_attention_checks.check_merging,
    halves_exchanged: te_attention_checks.check_merging,
    rotation_turned_the_wrong_way_in_the_backward_pass: partial(te_attention_checks.check_rotation, FP32),
    weight_decay_in_the_gradient: partial(te_optimizer_checks.check_adam, FP32),
    main_copy_not_written_back: partial(te_optimizer_checks.check_adam, BF16),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_check_sees_the_fault(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    check = FAULTS[fault]
    check()
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
