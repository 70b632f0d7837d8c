# SPDX-License-Identifier: Apache-2.0
"""Checks of Transformer Engine's layers against plain torch; each raises AssertionError where they differ.

They hold on a GPU as well as on the emulation. Differences are parts of the largest expected value. On the emulation
the products are torch's own in fp32, so what is left is named beside each figure; a GPU has TF32 products of fp32
operands (10 bits of mantissa: 1e-3), FP8 products with fast accumulation (1e-2) and another order of summation (bf16:
1e-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.gpu import te_references as references
from tests.gpu.devices import VIRTUAL
from tests.gpu.te_references import E4M3, E5M2, DelayedSlot, relative

ON_A_GPU = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
FP8_ON_A_GPU = 1e-2
RECIPES = ("delayed", "current", "blockwise")


def within(tolerance: float, on_a_gpu: float) -> float:
    """Return the tolerance of the device that there is."""
    return tolerance if VIRTUAL else on_a_gpu


def assert_near(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float, names: Sequence[str]
) -> None:
    """Compare tensor by tensor; a tolerance of 0 means equal."""
    for name, a, b in zip(names, actual, expected, strict=True):
        difference = relative(a, b)
        assert difference <= tolerance, f"{name}: {difference:.2e} of the largest value, allowed are {tolerance:.0e}"


def gradients(y: torch.Tensor, of: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients for a fixed random gradient of the output."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype).to(y.device)
    return list(torch.autograd.grad(y, of, dy))


def check_linear(dtype: torch.dtype, *, bias: bool) -> None:
    """te.Linear is torch's linear function, bit for bit where the product is torch's own."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    x = torch.randn(24, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
    layer = te.Linear(64, 96, bias=bias, params_dtype=dtype, device="cuda")
    parameters = [layer.weight, *([layer.bias] if bias else [])]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    y, expected = layer(x), F.linear(x, layer.weight, layer.bias if bias else None)
    names = ("y", "dx", "dw", "db")[: 2 + len(parameters)]
    tolerance = within(0.0, ON_A_GPU[dtype])
    of = [x, *parameters]
    assert_near([y, *gradients(y, of)], [expected, *gradients(expected, of)], tolerance, names)


def check_norm_linear(dtype: torch.dtype, normalization: str, tolerance: float) -> None:
    """te.LayerNormLinear is a norm and a linear function of torch."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    x = torch.randn(24, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
    layer = te.LayerNormLinear(
        64, 96, bias=False, params_dtype=dtype, device="cuda", normalization=normalization, eps=1e-5
    )
    parameters = [layer.layer_norm_weight, layer.weight]
    if normalization == "LayerNorm":
        parameters.append(layer.layer_norm_bias)
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    y = layer(x)
    if normalization == "LayerNorm":
        normed = F.layer_norm(x, (64,), layer.layer_norm_weight, layer.layer_norm_bias, 1e-5)
    else:
        normed = F.rms_norm(x, (64,), layer.layer_norm_weight, 1e-5)
    expected = F.linear(normed, layer.weight)
    of = [x, *parameters]
    names = ("y", "dx", "d norm weight", "dw", "d norm bias")[: 1 + len(of)]
    tolerance = within(tolerance, max(tolerance, ON_A_GPU[dtype]))
    assert_near([y, *gradients(y, of)], [expected, *gradients(expected, of)], tolerance, names)


def check_accumulation() -> None:
    """Weight gradients of two micro-batches add up in the fp32 main gradient, without a rounding to bf16 between."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.Linear(64, 96, bias=False, params_dtype=torch.bfloat16, device="cuda", fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros(96, 64, device="cuda")
    expected = torch.zeros(96, 64)
    for _ in range(2):
        x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(32, 96, device="cuda", dtype=torch.bfloat16)
        layer(x).backward(dy)
        expected += dy.cpu().float().t() @ x.detach().cpu().float()
    assert_near([layer.weight.main_grad], [expected], within(1e-6, 1e-5), ["main_grad"])  # fp32 sums


def te_recipe(kind: str, **options: Any) -> Any:
    """Return Transformer Engine's recipe of one of RECIPES."""
    from transformer_engine.common import recipe

    classes = {
        "delayed": recipe.DelayedScaling,
        "current": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
    }
    return classes[kind](**options)


def delayed_slots(**options: Any) -> dict[str, DelayedSlot]:
    """Return the states of a linear layer's three tensors; gradients are e5m2."""
    formats = {"x": E4M3, "w": E4M3, "dy": E5M2}
    return {name: DelayedSlot(format_, **options) for name, format_ in formats.items()}


def rounding_of(kind: str, slots: dict[str, DelayedSlot]) -> references.Rounding:
    """Return the reference's rounding of one of RECIPES."""
    if kind == "delayed":
        return references.delayed(slots)
    return {"current": references.current, "blockwise": references.blockwise}[kind]


# Of the emulation: blocks have powers of two for scales, so both sides compute the same numbers. Other scales are
# applied to the product there and to the operands in the reference: an fp32 rounding each, which may move a bf16 result
# by a unit in its last place (2^-7 at most).
FP8_TOLERANCE = {
    ("blockwise", torch.float32): 0.0,
    ("blockwise", torch.bfloat16): 0.0,
    ("current", torch.float32): 1e-6,
    ("current", torch.bfloat16): 8e-3,
    ("delayed", torch.float32): 1e-6,
    ("delayed", torch.bfloat16): 8e-3,
}


def check_fp8_linear(kind: str, dtype: torch.dtype, steps: int = 4) -> None:
    """te.Linear in FP8 gives the product of operands that are rounded to FP8, over steps with changing weights.

    Amaxes rise and fall, a whole 1x128 block is 0, and the difference to the unrounded layer is far larger than the
    tolerance.
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.Linear(256, 384, bias=True, params_dtype=dtype, device="cuda")
    torch.nn.init.normal_(layer.weight, std=0.1)
    torch.nn.init.normal_(layer.bias, std=0.1)
    slots = delayed_slots()
    rounding = rounding_of(kind, slots)
    recipe = te_recipe(kind)
    tolerance = within(FP8_TOLERANCE[kind, dtype], FP8_ON_A_GPU)
    for step in range(steps):
        x = (torch.randn(32, 4, 256, device="cuda") * (1, 4, 0.5, 0.25)[step % 4]).to(dtype)
        x[3, 2, :128] = 0
        x.requires_grad_()
        dy = (torch.randn(32, 4, 384, device="cuda") * (4e-3, 1e-3, 2.5e-4, 5e-4)[step % 4]).to(dtype)
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=recipe):
            y = layer(x)
        y.backward(dy)
        bias = layer.bias.bfloat16()  # the FP8 product takes no fp32 bias: Transformer Engine rounds it before
        expected = references.linear(rounding, x, layer.weight, bias, dy)
        for slot in slots.values():
            slot.end_step()
        actual = (y, x.grad, layer.weight.grad, layer.bias.grad)
        assert_near(actual, expected, tolerance, [f"{name} of step {step}" for name in expected._fields])
        unrounded = F.linear(x.detach(), layer.weight, layer.bias)
        assert step == 0 or relative(y, unrounded) > 1e-2, "the layer did not run in FP8"
        with torch.no_grad():
            layer.weight.add_(0.01 * torch.randn_like(layer.weight))


def layer_scales(layer: Any) -> dict[str, float]:
    """Return the delayed scales of a layer's input, weight and output gradient."""
    forward, backward = layer.fp8_meta["scaling_fwd"].scale, layer.fp8_meta["scaling_bwd"].scale
    return {"x": float(forward[0]), "w": float(forward[1]), "dy": float(backward[0])}


def check_delayed_scales(steps: int = 20, *, length: int = 1024, algorithm: str = "max", margin: int = 0) -> None:
    """Delayed scales are those of the reference after every step; passes between them move none.

    Before each step a pass without gradient (log-probabilities) sees larger values: it moves no scale, but its amax
    counts in the step that follows, as it lies in the same row of the history. Every other step is recomputed in its
    backward pass, which moves nothing.
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(1)
    layer = te.Linear(64, 96, bias=False, params_dtype=torch.bfloat16, device="cuda")
    recipe = te_recipe("delayed", amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    slots = delayed_slots(length=length, most_recent=algorithm == "most_recent", margin=margin)
    for step in range(steps):
        size = 1.7 ** torch.randn(3, generator=torch.Generator().manual_seed(step))
        before = layer_scales(layer) if step else None
        with torch.no_grad(), te.autocast(enabled=True, recipe=recipe):
            x = (torch.randn(16, 64, device="cuda") * size[0]).bfloat16()
            layer(x)
            slots["x"](x), slots["w"](layer.weight.detach())
        assert before is None or layer_scales(layer) == before, f"a pass without gradient moved a scale in step {step}"
        x = (torch.randn(16, 64, device="cuda") * size[1] * 0.3).bfloat16().requires_grad_()
        dy = (torch.randn(16, 96, device="cuda") * size[2] * 1e-3).bfloat16()
        slots["x"](x.detach()), slots["w"](layer.weight.detach()), slots["dy"](dy)
        with te.autocast(enabled=True, recipe=recipe):
            y = te.checkpoint(layer, x) if step % 2 else layer(x)
        forward = (layer_scales(layer)["x"], layer_scales(layer)["w"])
        y.backward(dy)
        assert (layer_scales(layer)["x"], layer_scales(layer)["w"]) == forward, f"recomputation moved a scale ({step})"
        for slot in slots.values():
            slot.end_step()
        assert layer_scales(layer) == {name: float(slot.scale) for name, slot in slots.items()}, f"step {step}"
        with torch.no_grad():
            layer.weight.mul_(1.0 + 0.1 * float(size[2] - 1))


def check_weight_cache(kind: str) -> None:
    """Micro-batches after the first use its FP8 weight; the next step's first one quantises the weight anew.

    ``kind`` is "current" or "blockwise".
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(2)
    layer = te.Linear(256, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
    rounding, recipe = rounding_of(kind, {}), te_recipe(kind)
    tolerance = within(FP8_TOLERANCE[kind, torch.bfloat16], FP8_ON_A_GPU)
    for step in range(2):
        for first in (True, False):
            x = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
            layer.zero_grad(set_to_none=True)
            with te.autocast(enabled=True, recipe=recipe):
                y = layer(x, is_first_microbatch=first)
            y.backward(dy)
            expected = references.linear(rounding, x, layer.weight, None, dy)
            names = [f"{name} of step {step}, first {first}" for name in ("y", "dx", "dw")]
            assert_near((y, x.grad, layer.weight.grad), expected[:3], tolerance, names)
        with torch.no_grad():
            layer.weight.mul_(-1.5)


def check_saturation() -> None:
    """Beyond the largest number of a format a cast gives that number: a spike after quiet steps becomes no NaN."""
    import transformer_engine.pytorch as te

    torch.manual_seed(3)
    layer = te.Linear(64, 96, bias=False, params_dtype=torch.bfloat16, device="cuda")
    slots = delayed_slots()
    for step in range(2):
        x = (torch.randn(16, 64, device="cuda") * (1, 1000)[step]).bfloat16().requires_grad_()
        dy = (torch.randn(16, 96, device="cuda") * (1, 1000)[step]).bfloat16()
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=te_recipe("delayed")):
            y = layer(x)
        y.backward(dy)
        expected = references.linear(references.delayed(slots), x, layer.weight, None, dy)
        for slot in slots.values():
            slot.end_step()
        names = [f"{name} of step {step}" for name in ("y", "dx", "dw")]
        tolerance = within(FP8_TOLERANCE["delayed", torch.bfloat16], FP8_ON_A_GPU)
        assert_near((y, x.grad, layer.weight.grad), expected[:3], tolerance, names)
