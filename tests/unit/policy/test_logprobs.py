# SPDX-License-Identifier: Apache-2.0
"""Claim: the log-probability kernel is log_softmax, gather and entropy, values and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.nouns import NO_LABEL
from megatron_g2rpo.policy.logprobs import vocab_parallel_logprobs

# float32 sums over 50 entries in another order.
TOLERANCE = 2e-6


def _case(rows: int = 9, padded: int = 53) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, padded, generator=generator)
    labels = torch.randint(50, (rows,), generator=generator)
    labels[3] = NO_LABEL
    return logits, labels


def _reference(logits: Tensor, labels: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits[:, :vocab] / temperature).log_softmax(-1)
    has_label = labels != NO_LABEL
    logprob = log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(has_label, logprob, 0.0), torch.where(has_label, entropy, 0.0)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(chunk: int | None, temperature: float) -> None:
    logits, labels = _case()
    weights = torch.randn(2, len(labels), generator=torch.Generator().manual_seed(1))
    grads = []
    for compute in (
        lambda x: vocab_parallel_logprobs(x, labels, vocab_size=50, temperature=temperature, chunk_size=chunk),
        lambda x: _reference(x, labels, 50, temperature),
    ):
        x = logits.clone().requires_grad_()
        logprob, entropy = compute(x)
        (weights[0] * logprob + weights[1] * entropy).sum().backward()
        grads.append((logprob.detach(), entropy.detach(), x.grad))
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_padding_columns_take_no_probability() -> None:
    """Negative: with the padding taken for vocabulary, the result must differ, or this test could not see it."""
    logits, labels = _case()
    right, _ = vocab_parallel_logprobs(logits, labels, vocab_size=50)
    wrong, _ = vocab_parallel_logprobs(logits, labels, vocab_size=53)
    assert (right - wrong).abs().max() > 1e-3


def test_a_peaked_distribution_stays_finite() -> None:
    logits = torch.full((2, 5), -1e4)
    logits[:, 2] = 1e4
    logits.requires_grad_()
    logprob, entropy = vocab_parallel_logprobs(logits, torch.tensor([2, 0]), vocab_size=5)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(entropy, torch.zeros(2))
    assert torch.equal(logprob, torch.tensor([0.0, -2e4]))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_no_rows() -> None:
    logprob, entropy = vocab_parallel_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), vocab_size=5)
    assert logprob.shape == entropy.shape == (0,)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature"):
        vocab_parallel_logprobs(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), vocab_size=5, temperature=0.0)
