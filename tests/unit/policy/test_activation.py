# SPDX-License-Identifier: Apache-2.0
"""Claim: the activations of the MLP, compiled (``bias_activation_fusion``) and not, are SwiGLU, gradients included.

megatron-core compiles SwiGLU and a gradient of its own for it. On a GPU the compiler writes Triton, here C++; both fuse
the same graph.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

from megatron_g2rpo.policy.swiglu import SwiGLU


# In bf16 the fused kernel rounds once, where separate operations round each result: two roundings of 1 part in 256.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 / 256)])
def test_the_compiled_activation_is_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 1, 96, generator=generator).to(dtype)
    upstream = torch.randn(37, 1, 48, generator=generator).to(dtype)
    exact, fused = x.double().requires_grad_(), x.clone().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    ours = bias_swiglu_impl(fused, None)
    expected.backward(upstream.double())
    ours.backward(upstream)
    assert ours.dtype is dtype
    assert exact.grad is not None
    assert fused.grad is not None
    for result, right in ((ours, expected), (fused.grad, exact.grad)):
        assert float((result.double() - right).norm() / right.norm()) < tolerance
    # Negative: gate and up the other way round are seen.
    assert float((F.silu(up) * gate - expected).norm() / expected.norm()) > 50 * tolerance


# Neither rounds anything that the other does not, but the gate's gradient, of which bf16 rounds one product more.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 / 256)])
def test_the_local_layers_activation_is_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 1, 96, generator=generator).to(dtype)
    upstream = torch.randn(37, 1, 48, generator=generator).to(dtype)
    exact, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    ours = SwiGLU()(mine)
    expected.backward(upstream.double())
    ours.backward(upstream)
    assert ours.dtype is dtype
    assert exact.grad is not None
    assert mine.grad is not None
    for result, right in ((ours, expected), (mine.grad, exact.grad)):
        assert float((result.double() - right).norm() / right.norm()) < tolerance
    # Negative: the gradient's halves the other way round are seen.
    swapped = torch.cat(exact.grad.chunk(2, dim=-1)[::-1], dim=-1)
    assert float((swapped - exact.grad).norm() / exact.grad.norm()) > 50 * tolerance
