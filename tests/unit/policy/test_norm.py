# SPDX-License-Identifier: Apache-2.0
"""Claim: the local layers' RMSNorm is transformers', and its closed-form gradient is that of autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from megatron_g2rpo.policy.norm import RMSNorm

EPS = 1e-6


def norms(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[RMSNorm, Qwen3VLTextRMSNorm, Tensor, Tensor]:
    """Ours and transformers' with one random weight; vectors of very different lengths; an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    ours, theirs = RMSNorm(config, shape[-1], EPS), Qwen3VLTextRMSNorm(shape[-1], EPS).to(dtype)
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    scale = 10.0 ** torch.randint(-3, 3, (*shape[:-1], 1), generator=generator)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return ours, theirs, x, torch.randn(shape, generator=generator).to(dtype)


def gradients(norm: torch.nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    weight = norm.weight.grad
    assert isinstance(weight, Tensor)
    assert x.grad is not None
    return y.detach(), x.grad, weight


# float32 adds the squares of a vector in another order. In bf16 the results of both round to 1 part in 256; the
# gradient is ours in fp32 and rounded once.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1 / 256)])
@pytest.mark.parametrize("shape", [(57, 1, 128), (57, 1, 4, 32), (1, 1, 24)])
def test_norm_and_gradient_are_transformers(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs, x, upstream = norms(shape, dtype)
    exact = Qwen3VLTextRMSNorm(shape[-1], EPS)
    exact.weight.data = theirs.weight.data.float()
    mine, right = gradients(ours, x, upstream), gradients(exact, x.float(), upstream.float())
    for result, expected, name in zip(mine, right, ("output", "input's gradient", "weight's gradient"), strict=True):
        assert result.dtype is dtype, name
        error = float((result.float() - expected).norm() / expected.norm())
        assert error < tolerance, f"{name}: {error}"
    if dtype is torch.bfloat16:  # the order of operations is theirs: normalise, round, multiply
        apart = mine[0] != theirs(x)
        assert apart.float().mean() < 1e-3, "fp32 sums in another order may round a few to the next bf16"


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    ours, _, x, upstream = norms((3, 1, 16), torch.float32)
    x[1] = 0
    y, grad, weight = gradients(ours, x, upstream)
    assert (y[1] == 0).all()
    assert grad.isfinite().all()
    assert weight.isfinite().all()


def test_the_gradient_without_its_projection_is_seen() -> None:
    """Negative: without the term along x, the mistake that is easily made, the gradient is far off."""
    ours, _, x, upstream = norms((57, 1, 128), torch.float32)
    _, right, _ = gradients(ours, x, upstream)
    without = upstream * ours.weight.detach() / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    assert float((without - right).norm() / right.norm()) > 1e-3


def test_a_frozen_weight_has_no_gradient_and_the_input_has_its_own() -> None:
    ours, _, x, upstream = norms((5, 1, 16), torch.float32)
    _, expected, _ = gradients(ours, x, upstream)
    ours.weight.grad = None
    ours.weight.requires_grad_(False)
    x = x.requires_grad_()
    ours(x).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert ours.weight.grad is None
