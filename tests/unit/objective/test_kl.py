# SPDX-License-Identifier: Apache-2.0
"""KL penalties: values and gradients, and what their gradients are in expectation, by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_g2rpo.objective import kl

every_kind = pytest.mark.parametrize("kind", ["k1", "k2", "k3"])


def by_formula(kind: str, difference: float, clamp: float) -> tuple[float, float]:
    """(value, derivative by the log-probability) of one token."""
    d = min(max(difference, -clamp), clamp)
    value = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
    slope = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[kind]
    return value, slope if abs(difference) < clamp else 0.0


@every_kind
@pytest.mark.parametrize("clamp", [20.0, 0.5])
def test_values_and_gradients_equal_the_formulas(kind: str, clamp: float) -> None:
    """float64; 1e-12, absolute where the formula of k3 cancels. Differences reach beyond the clamp; one is 0."""
    generator = torch.Generator().manual_seed(0)
    logprobs = (-5 * torch.rand(100, dtype=torch.float64, generator=generator)).requires_grad_()
    reference = logprobs.detach() - 1.5 * torch.randn(100, dtype=torch.float64, generator=generator)
    reference[:3] = logprobs.detach()[:3] + torch.tensor([0.0, 30.0, -30.0])
    reference.requires_grad_()
    result = kl.penalty(kind, logprobs, reference, log_ratio_clamp=clamp)
    result.sum().backward()
    expected = [by_formula(kind, d, clamp) for d in (logprobs - reference).tolist()]
    values, slopes = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(result, values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-12, atol=1e-12)
    assert reference.grad is None


@given(difference=st.floats(-30, 30, width=32), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(difference: float, dtype: torch.dtype) -> None:
    value = kl.penalty("k3", torch.tensor([difference], dtype=dtype), torch.zeros(1, dtype=dtype), log_ratio_clamp=20.0)
    assert value.item() >= 0.0
    assert value.isfinite().all()


def test_k3_keeps_small_differences_in_float32() -> None:
    """d^2 / 2 up to order d^3; ``exp(-d) - 1 + d`` as written would be a multiple of 6e-8, that is 0."""
    difference = torch.tensor([1e-4, -1e-4])
    value = kl.penalty("k3", difference, torch.zeros(2), log_ratio_clamp=20.0)
    torch.testing.assert_close(value, difference.square() / 2, rtol=1e-2, atol=0.0)


def distributions(distance: float) -> tuple[Tensor, Tensor]:
    """Logits of the policy [V], with gradient, and log-probabilities of a reference [V] about ``distance`` away."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator)
    reference = (logits + distance * torch.randn(6, dtype=torch.float64, generator=generator)).log_softmax(0)
    return logits.requires_grad_(), reference


def expectations(kind: str, distance: float) -> tuple[Tensor, Tensor]:
    """Mean penalty and mean gradient by the logits [V] over all outcomes, each as likely as under the policy."""
    logits, reference = distributions(distance)
    logprobs = logits.log_softmax(0)
    mean = (logprobs.detach().exp() * kl.penalty(kind, logprobs, reference, log_ratio_clamp=20.0)).sum()
    (gradient,) = torch.autograd.grad(mean, logits)
    return mean.detach(), gradient


def divergences(distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(policy || reference), and the gradients of it and of KL(reference || policy) by the logits."""
    logits, reference = distributions(distance)
    logprobs = logits.log_softmax(0)
    reverse = (logprobs.exp() * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (forward_gradient,) = torch.autograd.grad(forward, logits)
    return reverse.detach(), reverse_gradient, forward_gradient


def test_mean_gradients_are_those_of_the_docstring() -> None:
    """Exact expectations, 1e-12. The divergences are far enough apart for a mix-up to show."""
    reverse, reverse_gradient, forward_gradient = divergences(1.0)
    assert (reverse_gradient - forward_gradient).abs().max() > 0.01
    for kind in ("k1", "k3"):
        torch.testing.assert_close(expectations(kind, 1.0)[0], reverse, rtol=1e-12, atol=0.0)
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": reverse_gradient, "k3": forward_gradient}
    for kind, gradient in expected.items():
        torch.testing.assert_close(expectations(kind, 1.0)[1], gradient, rtol=1e-12, atol=1e-12)


def test_k2_is_close_to_the_divergence_and_k3_to_its_gradient_where_the_policies_are_close() -> None:
    """Both errors are one order of the distance above the quantity itself: a tenth of the distance, a tenth of them."""
    value_errors, gradient_errors = [], []
    for distance in (1e-2, 1e-3):
        reverse, reverse_gradient, _ = divergences(distance)
        value_errors.append((expectations("k2", distance)[0] / reverse - 1).abs().item())
        gap = (expectations("k3", distance)[1] - reverse_gradient).norm() / reverse_gradient.norm()
        gradient_errors.append(gap.item())
    for far, near in (value_errors, gradient_errors):
        assert far < 0.02
        assert near / far == pytest.approx(0.1, rel=0.05)


@every_kind
def test_no_tokens_no_penalty(kind: str) -> None:
    assert kl.penalty(kind, torch.zeros(0), torch.zeros(0), log_ratio_clamp=20.0).shape == (0,)


def test_unknown_kinds_shapes_and_clamps_are_errors() -> None:
    assert kl.KINDS == ("k1", "k2", "k3")
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4'.*known: k1, k2, k3"):
        kl.penalty("k4", zeros, zeros, log_ratio_clamp=20.0)
    with pytest.raises(ValueError, match="one shape"):
        kl.penalty("k1", zeros, torch.zeros(1), log_ratio_clamp=20.0)
    for clamp in (0.0, math.nan):
        with pytest.raises(ValueError, match="log_ratio_clamp"):
            kl.penalty("k1", zeros, zeros, log_ratio_clamp=clamp)
