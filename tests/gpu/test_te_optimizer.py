# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's optimizer kernels: FusedAdam against torch's AdamW, norms and scaling against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu import te_optimizer_checks as checks
from tests.gpu.devices import needs_cuda, needs_transformer_engine

pytestmark = [needs_cuda, needs_transformer_engine]


@pytest.fixture(scope="module")
def tex() -> Any:
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch

    return transformer_engine_torch


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16_with_main_copies"])
def test_fused_adam_is_torchs_adamw_over_five_steps(dtype: torch.dtype, capturable: bool) -> None:
    checks.check_adam(dtype, capturable=capturable)


def test_a_capturable_step_is_skipped_and_unscaled_by_tensors(tex: Any) -> None:
    """A flag of 1 leaves all as it is; gradients are multiplied with the inverse of the loss scale first, in place."""

    def lists() -> list[list[torch.Tensor]]:
        gradient, parameter = torch.full((8,), 4.0, device="cuda"), torch.ones(8, device="cuda")
        return [[gradient], [parameter], [torch.zeros(8, device="cuda")], [torch.zeros(8, device="cuda")]]

    def step(tensors: list[list[torch.Tensor]], flag: int) -> None:
        lr, inv_scale = torch.tensor(0.1, device="cuda"), torch.tensor([0.25], device="cuda")
        one, noop = torch.tensor([1], dtype=torch.int32, device="cuda"), torch.tensor([flag], device="cuda").int()
        numbers = (0.9, 0.99, 1e-8, one, 1, 1, 0.0, inv_scale)
        tex.multi_tensor_adam_capturable(65536, noop, tensors, lr, *numbers)

    skipped, done = lists(), lists()
    step(skipped, 1)
    step(done, 0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(skipped, lists(), strict=True))
    assert done[0][0].tolist() == [1.0] * 8
    torch.testing.assert_close(done[2][0], torch.full((8,), 0.1, device="cuda"), rtol=1e-6, atol=0)  # (1 - 0.9) * 1
    torch.testing.assert_close(done[1][0], torch.full((8,), 0.9, device="cuda"), rtol=1e-6, atol=0)  # 1 - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_norm_is_that_of_all_tensors_together(dtype: torch.dtype, tex: Any) -> None:
    tensors = [each.detach() for each in checks.parameters(dtype)]
    noop = torch.zeros(1, dtype=torch.int32, device="cuda")
    exact = [each.double().norm() for each in tensors]
    total, each = tex.multi_tensor_l2norm(65536, noop, [tensors], True)
    # fp32 sums of squares in some order.
    torch.testing.assert_close(total[0].double(), torch.stack(exact).norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(each.double(), torch.stack(exact), rtol=1e-6, atol=0)
    assert tex.multi_tensor_l2norm(65536, noop, [tensors], False)[1].numel() == 0
    scale = torch.tensor([0.5], device="cuda")
    unscaled, _ = tex.multi_tensor_unscale_l2norm(65536, noop, [tensors], scale, False)
    torch.testing.assert_close(unscaled, total * 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_scaling_converts_and_reports_what_is_not_finite(by_tensor: bool, tex: Any) -> None:
    scale: Any = torch.tensor([0.5], device="cuda") if by_tensor else 0.5
    function = tex.multi_tensor_scale_tensor if by_tensor else tex.multi_tensor_scale
    source = [torch.tensor([3.0, -1.0], device="cuda"), torch.full((2, 2), 2.0, device="cuda").bfloat16()]
    target = [torch.zeros(2, device="cuda").bfloat16(), torch.zeros(2, 2, device="cuda")]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    function(65536, flag, [source, target], scale)
    assert target[0].tolist() == [1.5, -0.5]
    assert target[1].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert int(flag) == 0
    source[0][1] = float("inf")
    function(65536, flag, [source, target], scale)
    assert int(flag) == 1
