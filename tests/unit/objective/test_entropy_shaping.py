# SPDX-License-Identifier: Apache-2.0
"""Claim: linear terms per micro-batch have exactly the gradient of the hinge of the full-batch mean entropies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.objective import entropy

TASKS = 5  # 0 too random, 1 too certain, 2 within its bounds, 3 absent from the batch, 4 not shaped
LOW = torch.tensor([0.2, 2.5, 0.2, 0.5, -torch.inf], dtype=torch.float64)
HIGH = torch.tensor([0.6, 3.0, 9.0, 0.6, torch.inf], dtype=torch.float64)
WEIGHT = 0.02
SIDES = [1, -1, 0, 0, 0]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [S, D], task ids and mask [S]; S = 64. Positions outside the mask carry the id -1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    task_ids = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (64,), generator=generator)]
    mask = (torch.rand(64, generator=generator) < 0.7).float()
    return hidden, torch.where(mask > 0, task_ids, -1), mask


def policy() -> Tensor:
    """A language-model head [D, V]: all tokens share its gradient."""
    return torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def token_entropy(hidden: Tensor, head: Tensor) -> Tensor:
    logprobs = (hidden @ head).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def hinge_of_the_full_batch(hidden: Tensor, task_ids: Tensor, mask: Tensor, head: Tensor) -> Tensor:
    """The loss as the paper writes it, on the whole batch at once: the oracle."""
    loss = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        members = (task_ids == task) & (mask > 0)
        if members.any():
            mean = token_entropy(hidden[members], head).mean()
            loss = loss + (mean - HIGH[task]).relu() + (LOW[task] - mean).relu()
    return WEIGHT * loss


def gradient_by_micro_batches(count: int) -> Tensor:
    hidden, task_ids, mask = batch()
    head, total = policy(), float(mask.sum())
    parts = list(zip(hidden.chunk(count), task_ids.chunk(count), mask.chunk(count), strict=True))
    with torch.no_grad():
        sums = [entropy.task_entropy_sums(token_entropy(h, head), t, m, TASKS) for h, t, m in parts]
    entropy_sums, counts = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
    sides = entropy.hinge_sides(entropy_sums, counts, LOW, HIGH)
    assert sides.tolist() == SIDES
    for h, t, m in parts:
        weights = entropy.entropy_loss_weights(t, m, sides, counts, WEIGHT, total)
        ((weights * token_entropy(h, head)).sum() / total).backward()
    assert head.grad is not None
    return head.grad


def test_the_gradient_is_that_of_the_full_batch_hinge_for_any_micro_batching() -> None:
    """1e-6 relative to the largest entry against the oracle (coefficients are float32); 1e-12 between 1 and 8."""
    head = policy()
    hinge_of_the_full_batch(*batch(), head).backward()
    assert head.grad is not None
    size = float(head.grad.abs().max())
    one, eight = gradient_by_micro_batches(1), gradient_by_micro_batches(8)
    torch.testing.assert_close(one, head.grad, rtol=0, atol=1e-6 * size)
    torch.testing.assert_close(eight, one, rtol=0, atol=1e-12 * size)


def test_the_hinge_of_each_micro_batch_would_have_another_gradient() -> None:
    """Why the sides are global: the plain way, a hinge per micro-batch, is off by more than a tenth here."""
    hidden, task_ids, mask = batch()
    head = policy()
    for part in zip(hidden.chunk(8), task_ids.chunk(8), mask.chunk(8), strict=True):
        (hinge_of_the_full_batch(*part, head) / 8).backward()
    exact = gradient_by_micro_batches(1)
    assert head.grad is not None
    assert float((head.grad - exact).abs().max()) > 0.1 * float(exact.abs().max())


def test_the_reported_value_is_the_loss_and_its_gradient_has_the_same_sides() -> None:
    hidden, task_ids, mask = batch()
    head = policy().detach()
    sums, counts = entropy.task_entropy_sums(token_entropy(hidden, head), task_ids, mask, TASKS)
    expected = hinge_of_the_full_batch(hidden, task_ids, mask, head)
    torch.testing.assert_close(entropy.hinge_loss(sums, counts, LOW, HIGH, WEIGHT), expected, rtol=1e-12, atol=0)
    assert counts[3] == 0


def test_sides_at_the_bounds_and_of_absent_tasks_are_zero() -> None:
    sums, counts = torch.tensor([4.0, 12.0, 8.0, 0.0]), torch.tensor([20.0, 20.0, 20.0, 0.0])
    low, high = torch.full((4,), 0.2), torch.full((4,), 0.6)
    assert entropy.hinge_sides(sums, counts, low, high).tolist() == [0, 0, 0, 0]


def test_bounds_that_cross_and_response_tokens_without_a_task_are_errors() -> None:
    one = torch.ones(1)
    for low, high in ((0.6, 0.2), (float("nan"), 0.2)):
        with pytest.raises(ValueError, match="low <= high"):
            entropy.hinge_sides(one, one, torch.tensor([low]), torch.tensor([high]))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        entropy.task_entropy_sums(torch.ones(2), torch.tensor([0, -1]), torch.ones(2), 1)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        entropy.entropy_loss_weights(torch.tensor([0, -1]), torch.ones(2), torch.ones(1), torch.ones(1), 0.02, 2.0)
