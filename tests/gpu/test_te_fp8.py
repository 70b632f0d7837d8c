# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's layers in FP8 against an independent quantisation, and its scales against literal numbers.

Second opinions: where Transformer Engine has Python code for what its kernels do (current scaling, scales of blocks,
the update of delayed scaling), bytes and scales are compared with it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu import te_checks as checks
from tests.gpu import te_references as references
from tests.gpu.devices import needs_cuda, needs_transformer_engine, needs_virtual

pytestmark = [needs_cuda, needs_transformer_engine]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
both_formats = pytest.mark.parametrize("format_", [references.E4M3, references.E5M2], ids=["e4m3", "e5m2"])


@pytest.fixture(scope="module")
def tex() -> Any:
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch

    return transformer_engine_torch


def te_dtype(tex: Any, format_: references.Format) -> Any:
    return tex.DType.kFloat8E4M3 if format_ is references.E4M3 else tex.DType.kFloat8E5M2


@both_types
@pytest.mark.parametrize("kind", checks.RECIPES)
def test_a_linear_layer_multiplies_operands_rounded_to_fp8(kind: str, dtype: torch.dtype) -> None:
    checks.check_fp8_linear(kind, dtype)


@pytest.mark.parametrize("kind", checks.RECIPES)
def test_a_norm_hands_its_output_to_the_product_in_fp8(kind: str) -> None:
    """Delayed scaling casts the norm's fp32 result, the others the result rounded to bf16.

    The scale of current scaling comes from the amax of the fp32 result all the same.
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.LayerNormLinear(
        256, 128, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cuda"
    )
    torch.nn.init.normal_(layer.layer_norm_weight)
    slots = checks.delayed_slots()
    for step in range(2):
        x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=checks.te_recipe(kind)):
            y = layer(x)
        y.backward(dy)
        x_cpu = x.detach().cpu().requires_grad_()
        gamma = layer.layer_norm_weight.detach().cpu().float()
        normed = torch.nn.functional.rms_norm(x_cpu.float(), (256,), gamma, layer.eps)
        fed = normed.detach() if kind == "delayed" else normed.detach().bfloat16()
        rounding = _of_unrounded_amax(normed) if kind == "current" else checks.rounding_of(kind, slots)
        expected = references.linear(rounding, fed, layer.weight, None, dy)
        for slot in slots.values():
            slot.end_step()
        normed.backward(expected.dx.bfloat16().float())
        actual = (y, x.grad, layer.weight.grad)
        names = [f"{name} of step {step}" for name in ("y", "dx", "dw")]
        # The norm's fp32 sums are ordered differently: a value on a boundary may round to the next FP8 number (2^-3).
        tolerance = checks.within(1e-2, 3e-2)
        checks.assert_near(actual, (expected.y, x_cpu.grad, expected.dw), tolerance, names)


def _of_unrounded_amax(normed: torch.Tensor) -> references.Rounding:
    def of(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> references.Rounded:
        scale = torch.tensor(references.E4M3.maximum) / normed.detach().abs().max()
        rx = references.rounded(x, references.E4M3, scale)
        return references.current(x, w, dy)._replace(x=rx, x_for_dw=rx)

    return of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 3},
        {"length": 1, "algorithm": "most_recent"},
        {"length": 16, "algorithm": "most_recent"},
        {"length": 4, "margin": 2},
    ],
    ids=str,
)
def test_delayed_scales_are_equal_after_each_of_20_steps_and_nothing_else_moves_them(options: dict[str, Any]) -> None:
    checks.check_delayed_scales(20, **options)


@pytest.mark.parametrize("kind", ["current", "blockwise"])
def test_a_cached_weight_is_quantised_anew_in_each_step(kind: str) -> None:
    checks.check_weight_cache(kind)


def test_a_cast_saturates() -> None:
    checks.check_saturation()


# ---- golden scales ---------------------------------------------------------------------------------------------------


def delayed_update(
    tex: Any, amaxes: list[float], *, length: int, algorithm: str = "max", margin: int = 0, gradient: bool = False
) -> list[float]:
    """Return the scale after each update with these amaxes."""
    history = torch.zeros(length, 1, device="cuda")
    scale = torch.ones(1, device="cuda")
    dtype = tex.DType.kFloat8E5M2 if gradient else tex.DType.kFloat8E4M3
    scales = []
    for amax in amaxes:
        history[0] = amax
        buffer = history[0].clone()
        tex.fused_amax_and_scale_update_after_reduction(buffer, [history], [scale], algorithm, dtype, margin)
        scales.append(float(scale))
    return scales


GOLDEN: dict[str, tuple[list[float], dict[str, Any], list[float]]] = {
    "the maximum is 448": ([2.0, 7.0], {"length": 1}, [224.0, 64.0]),
    "of gradients 57344": ([2.0, 7.0], {"length": 1, "gradient": True}, [28672.0, 8192.0]),
    "a quotient rounds once": ([0.1, 3.0], {"length": 1}, [4480.0, 149.3333282470703]),
    "margin halves": ([2.0], {"length": 1, "margin": 1}, [112.0]),
    "margin of three": ([7.0], {"length": 1, "margin": 3, "gradient": True}, [1024.0]),
    "an amax lives as long as the history": ([4.0, 1.0, 1.0, 1.0], {"length": 3}, [112.0, 112.0, 112.0, 448.0]),
    "and in the default history": ([4.0, *[1.0] * 1023, 1.0], {"length": 1024}, [*[112.0] * 1024, 448.0]),
    "most recent": ([4.0, 1.0, 2.0], {"length": 3, "algorithm": "most_recent"}, [112.0, 448.0, 224.0]),
    "a slot without use stays": ([4.0, 0.0, 0.0, 0.0, 1.0], {"length": 2}, [112.0, 112.0, 112.0, 112.0, 112.0]),
    "an infinite amax moves nothing": ([4.0, float("inf")], {"length": 1}, [112.0, 112.0]),
    "an infinite scale is cut": ([1e-38], {"length": 1, "gradient": True}, [3.4028234663852886e38]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_delayed_scales_are_these_numbers(name: str, tex: Any) -> None:
    amaxes, options, expected = GOLDEN[name]
    assert delayed_update(tex, amaxes, **options) == expected


def test_the_reduced_amax_of_all_ranks_enters_the_history(tex: Any) -> None:
    history = torch.tensor([[1.0, 5.0], [0.0, 0.0]], device="cuda")
    scale = torch.ones(2, device="cuda")
    reduced = torch.tensor([7.0, 14.0], device="cuda")
    tex.fused_amax_and_scale_update_after_reduction(reduced, [history], [scale], "max", tex.DType.kFloat8E4M3, 0)
    assert scale.tolist() == [64.0, 32.0]
    assert history.tolist() == [[0.0, 0.0], [7.0, 14.0]]


def current_quantizer(dtype: Any, **options: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    return Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"), **options)


@pytest.mark.parametrize(
    ("values", "options", "scale_inv"),
    [
        ([1.0, -2.0], {}, 0.0044642859138548374),
        ([1.0, -7.0], {}, 0.015625),
        ([0.0, 0.0], {}, 1.0),
        ([3.0, 1.0], {"force_pow_2_scales": True}, 0.0078125),
        ([1e-3, 0.0], {"amax_epsilon": 7.0}, 0.015625),
    ],
)
def test_current_scales_are_these_numbers(
    values: list[float], options: dict[str, Any], scale_inv: float, tex: Any
) -> None:
    """448 / 2 = 224; 448 / 7 = 64; nothing to scale; 448 / 3 cut to 128; the smallest amax taken for one."""
    quantizer = current_quantizer(tex.DType.kFloat8E4M3, **options)
    x = torch.tensor(values, device="cuda").repeat(16, 8)
    assert float(quantizer(x)._scale_inv) == scale_inv


def block_quantizer(dtype: Any, dimension: int) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    return Float8BlockQuantizer(dtype, rowwise=True, columnwise=True, block_scaling_dim=dimension)


def test_scales_of_blocks_are_these_numbers(tex: Any) -> None:
    """Powers of two below 448 / amax, for each 1x128 block and for each 128x128 tile; 1 where all is 0."""
    x = torch.zeros(4, 256, device="cuda")
    x[0, 3], x[1, 200], x[2, 0] = 3.0, -448.0, 449.0
    blocks = block_quantizer(tex.DType.kFloat8E4M3, 1)(x)
    assert blocks._rowwise_scale_inv.tolist() == [[1 / 128, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    tiles = block_quantizer(tex.DType.kFloat8E4M3, 2)(x)
    assert tiles._rowwise_scale_inv[:, :2].tolist() == [[2.0, 1.0]]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@both_formats
def test_bytes_are_rounded_to_even_and_saturate(format_: references.Format, tex: Any) -> None:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    scale = torch.ones(1, device="cuda")
    quantizer = Float8Quantizer(scale, torch.zeros(1, device="cuda"), te_dtype(tex, format_))
    top = format_.maximum
    x = torch.tensor([0.0, -0.0, 1.0, 1.0625, 1.1875, top, top * 1.01, -top * 100, 3e38, 2**-9, 1e-8] * 16)[:176]
    data = quantizer(x.view(16, 11).repeat(1, 16).cuda())
    expected = x.view(16, 11).repeat(1, 16).clamp(-top, top).to(format_.dtype)
    assert torch.equal(data._data.cpu(), expected.view(torch.uint8))
    assert float(data._data.view(format_.dtype).float().max()) == top
    assert float(quantizer.amax) == float(torch.tensor(3e38))


@both_formats
@both_types
@pytest.mark.parametrize("power_of_two", [False, True])
def test_current_scaling_is_transformer_engines_python_reference(
    format_: references.Format, dtype: torch.dtype, power_of_two: bool, tex: Any
) -> None:
    """Bytes of both sides, scale and values read back, for sizes over 40 powers of two, and for a tensor of zeros.

    The reference does not clamp: its scale sends the amax to the largest number exactly, or to one that rounds to it.
    """
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    theirs = CurrentScalingQuantizerRef(dtype=format_.dtype, pow_2_scales=power_of_two)
    ours = current_quantizer(te_dtype(tex, format_), force_pow_2_scales=power_of_two)
    torch.manual_seed(0)
    for size in (0.0, *(2.3**exponent for exponent in range(-16, 17, 4))):
        x = (torch.randn(32, 48) * size).to(dtype).cuda()
        actual, expected = ours(x), theirs.quantize(x.cpu())
        assert torch.equal(actual._scale_inv.cpu(), expected.scale), size
        assert torch.equal(actual._data.cpu(), expected.data.view(torch.uint8)), size
        assert torch.equal(actual._transpose.cpu(), expected.data_t.view(torch.uint8)), size
        read_back = theirs.dequantize(expected.data, expected.scale, dtype)
        assert torch.equal(actual.dequantize(dtype=dtype).cpu(), read_back), size


@both_types
def test_scales_of_blocks_are_transformer_engines_python_reference(dtype: torch.dtype, tex: Any) -> None:
    from transformer_engine.pytorch.custom_recipes import reference_current_scaling

    torch.manual_seed(0)
    sizes = 1.9 ** torch.arange(-12.0, 12.0)
    x = (torch.randn(24, 384) * sizes[:, None]).to(dtype)
    quantised = block_quantizer(tex.DType.kFloat8E4M3, 1)(x.cuda())
    amax = x.float().view(24, 3, 128).abs().amax(-1)
    scale, scale_inv, _ = reference_current_scaling._scale_from_amax_tensor(
        dtype, amax, torch.float8_e4m3fn, eps=0.0, pow_2_scales=True
    )
    assert torch.equal(quantised._rowwise_scale_inv.cpu()[:, :24].t(), scale_inv)
    bytes_ = (x.float().view(24, 3, 128) * scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).view(24, 384)
    assert torch.equal(quantised._rowwise_data.cpu(), bytes_)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 3, 1024])
def test_the_update_of_delayed_scaling_is_transformer_engines_python_version(
    length: int, algorithm: str, tex: Any
) -> None:
    """The one that NVTE_UNFUSED_FP8_UPDATE selects.

    Scales may differ in the last place (2^-23), as it divides a number by a tensor, which rounds twice. Histories are
    equal; only for slots without use does it roll what the kernel leaves.
    """
    from transformer_engine.pytorch import quantization

    recipe = checks.te_recipe("delayed", amax_history_len=length, amax_compute_algo=algorithm, margin=1)
    torch.manual_seed(0)
    ours, ours_scale = torch.zeros(length, 5, device="cuda"), torch.ones(5, device="cuda")
    theirs, theirs_scale = ours.clone(), ours_scale.clone()
    for _ in range(6):
        amax = 3 ** torch.randn(5, device="cuda")
        ours[0], theirs[0] = amax, amax
        tex.fused_amax_and_scale_update_after_reduction(
            amax.clone(), [ours], [ours_scale], algorithm, tex.DType.kFloat8E4M3, 1
        )
        quantization._amax_and_scale_update(theirs, theirs_scale, 448.0, recipe)
        torch.testing.assert_close(ours_scale, theirs_scale, rtol=2**-23, atol=0)
        assert length == 1 or torch.equal(ours, theirs)


def test_fp8_primary_weights_read_back_what_was_written(tex: Any) -> None:
    """An FP8 weight takes a copy of a high-precision one: its values are those of a cast and back."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    for kind, reference in (("current", references.tensorwise), ("blockwise", references.tiles)):
        with te.quantized_model_init(enabled=True, recipe=checks.te_recipe(kind)):
            layer = te.Linear(256, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
        new = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(new)
        expected = reference(new, references.E4M3).bfloat16()
        assert torch.equal(layer.weight.dequantize().cpu(), expected), kind


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_of_a_weight_are_cast_to_the_bytes_of_the_whole(shards: int, tex: Any) -> None:
    """The distributed optimizer holds flat shards of fp32 masters: it joins amaxes of tiles, then casts each."""
    torch.manual_seed(0)
    weight = torch.randn(192, 320, device="cuda") * 5
    whole = block_quantizer(tex.DType.kFloat8E4M3, 2)(weight)
    parts = weight.view(-1).tensor_split(shards)
    starts = [sum(part.numel() for part in parts[:i]) for i in range(shards)]
    amaxes = []
    for part, start in zip(parts, starts, strict=True):
        amax = torch.full((2, 3), -1.0, device="cuda").clamp(min=0)
        tex.fp8_block_scaling_compute_partial_amax(part, amax, 192, 320, start, 128)
        amaxes.append(amax)
    amax = torch.stack(amaxes).amax(0)
    scale, scale_inv = torch.zeros(6, device="cuda"), torch.zeros(6, device="cuda")
    lists = [[each[i : i + 1] for i in range(6)] for each in (amax.view(-1), scale, scale_inv)]
    noop = torch.zeros(1, dtype=torch.int32, device="cuda")
    tex.multi_tensor_compute_scale_and_scale_inv(65536, noop, lists, 448.0, True, 0.0)
    assert torch.equal(scale_inv.view(2, 3), whole._rowwise_scale_inv[:, :3])
    out = torch.zeros(weight.numel(), dtype=torch.uint8, device="cuda")
    for part, start in zip(parts, starts, strict=True):
        target = out[start : start + part.numel()]
        tex.fp8_block_scaling_partial_cast(part, target, scale.view(2, 3), 192, 320, start, 128, tex.DType.kFloat8E4M3)
    assert torch.equal(out.view(192, 320), whole._rowwise_data)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_rows_that_fp8_products_cannot_take_are_refused() -> None:
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)
    with te.autocast(enabled=True, recipe=checks.te_recipe("current")), pytest.raises((AssertionError, ValueError)):
        layer(x)


def test_mxfp8_is_refused_on_hopper() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import MXFP8BlockScaling

    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this device has MXFP8")
    with (
        pytest.raises((AssertionError, RuntimeError), match=r"[Cc]ompute capability|MXFP8"),
        te.autocast(enabled=True, recipe=MXFP8BlockScaling()),
    ):
        pass


@needs_virtual
def test_a_quantizer_that_hopper_has_not_says_its_name(tex: Any) -> None:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    quantizer = MXFP8Quantizer(tex.DType.kFloat8E4M3)
    with pytest.raises(NotImplementedError, match="MXFP8Quantizer is not emulated"):
        tex.quantize(torch.ones(32, 32, device="cuda"), quantizer)


@needs_virtual
def test_a_product_whose_operand_lacks_its_columns_is_refused(tex: Any) -> None:
    """Hopper multiplies "TN" only, so an untransposed weight has to have been transposed before."""
    from tests.gpu.te_emulation.quantized_tensors import operand

    quantizer = current_quantizer(tex.DType.kFloat8E4M3)
    quantizer.set_usage(rowwise=True, columnwise=False)
    quantised = quantizer(torch.ones(16, 32, device="cuda"))
    with pytest.raises(RuntimeError, match="no column-wise data"):
        operand(quantised, columnwise=True)
