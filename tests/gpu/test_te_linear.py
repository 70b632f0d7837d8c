# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's linear layers and norms against torch, in fp32 and bf16."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.gpu import te_checks as checks
from tests.gpu.devices import needs_cuda, needs_transformer_engine, needs_virtual

pytestmark = [needs_cuda, needs_transformer_engine]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@both_types
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_a_linear_layer_is_torchs(dtype: torch.dtype, bias: bool) -> None:
    checks.check_linear(dtype, bias=bias)


# fp32: another order of summation in the norm. bf16: torch rounds the norm's statistics and output at other places,
# which shows as units in the last place of bf16 (2^-8) of the product, and of sums over tokens in the norm's gradients.
@pytest.mark.parametrize(
    ("dtype", "normalization", "tolerance"),
    [
        (torch.float32, "LayerNorm", 1e-6),
        (torch.float32, "RMSNorm", 1e-6),
        (torch.bfloat16, "LayerNorm", 2e-2),
        (torch.bfloat16, "RMSNorm", 2e-2),
    ],
)
def test_a_norm_and_a_linear_layer_are_torchs(dtype: torch.dtype, normalization: str, tolerance: float) -> None:
    checks.check_norm_linear(dtype, normalization, tolerance)


@both_types
@pytest.mark.parametrize("zero_centered", [False, True], ids=["gamma", "one_plus_gamma"])
def test_rms_norm_is_torchs(dtype: torch.dtype, zero_centered: bool) -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    x = torch.randn(24, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
    norm = te.RMSNorm(64, eps=1e-5, dtype=dtype, device="cuda", zero_centered_gamma=zero_centered)
    torch.nn.init.normal_(norm.weight)
    y = norm(x)
    gamma = norm.weight.float() + 1 if zero_centered else norm.weight.float()
    expected = F.rms_norm(x.float(), (64,), gamma, 1e-5).to(dtype)
    of = [x, norm.weight]
    # fp32: the order of summation. bf16: one rounding of the result, which the gradient of the reference has as well.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    actual = [y, *checks.gradients(y, of)]
    checks.assert_near(actual, [expected, *checks.gradients(expected, of)], tolerance, ["y", "dx", "dgamma"])


def test_weight_gradients_accumulate_in_fp32() -> None:
    checks.check_accumulation()


@pytest.mark.parametrize("recipe", [None, "current"])
def test_grouped_layers_are_one_layer_for_each_expert(recipe: str | None) -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    splits = [32, 96, 0]
    layer = te.GroupedLinear(3, 128, 64, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(sum(splits), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(sum(splits), 64, device="cuda", dtype=torch.bfloat16)
    with te.autocast(enabled=recipe is not None, recipe=checks.te_recipe(recipe or "current")):
        y = layer(x, splits)
    y.backward(dy)
    at = 0
    for expert, rows in enumerate(splits[:2]):
        part = slice(at, at + rows)
        at += rows
        weight = getattr(layer, f"weight{expert}")
        rounding = checks.references.current if recipe else _unrounded
        expected = checks.references.linear(rounding, x[part], weight, None, dy[part])
        names = [f"{name} of expert {expert}" for name in ("y", "dx", "dw")]
        # One rounding to bf16 of an fp32 sum that may differ in its last place: 2^-7 at most.
        tolerance = checks.within(8e-3, checks.FP8_ON_A_GPU)
        checks.assert_near((y[part], x.grad[part], weight.grad), expected[:3], tolerance, names)


def _unrounded(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> checks.references.Rounded:
    return checks.references.Rounded(*(each.float() for each in (x, w, dy, x, dy)))


@needs_virtual
def test_the_stand_in_for_apex_adds_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's own layers ask for it where weight gradients accumulate in the product."""
    from importlib.util import find_spec

    from tests.gpu.te_emulation import apex_wgrad

    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # after this test it is gone again
    apex_wgrad.install()
    assert find_spec(name) is not None
    torch.manual_seed(0)
    x, dy = torch.randn(4, 8, 16, dtype=torch.bfloat16), torch.randn(4, 8, 32, dtype=torch.bfloat16)
    main_grad = torch.ones(32, 16)
    importlib.import_module(name).wgrad_gemm_accum_fp32(x, dy, main_grad)
    expected = 1 + torch.einsum("sbn,sbk->nk", dy.float(), x.float())
    torch.testing.assert_close(main_grad, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
