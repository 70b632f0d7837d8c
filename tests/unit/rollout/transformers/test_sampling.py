# SPDX-License-Identifier: Apache-2.0
"""Sampling by inverting the cumulative distribution at a number that belongs to the row."""

from __future__ import annotations

import hashlib

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.sampling import Draw, Drawing, filtered, uniforms

ALL = torch.arange(50)
PLAIN = Sampling(temperature=1.0)


def draw(logits: torch.Tensor, uniform: torch.Tensor | None, *, sampling: Sampling, allowed: torch.Tensor) -> Draw:
    banned = sorted(set(range(logits.shape[1])) - set(allowed.tolist()))
    return Drawing(banned, logits.shape[1])(logits, uniform, sampling)


def test_uniforms_are_a_pure_function_of_seed_prompt_and_sample():
    numbers = uniforms(7, "shard-0/12", 3, 16)
    assert torch.equal(numbers, uniforms(7, "shard-0/12", 3, 16))
    assert torch.equal(numbers, uniforms(7, "shard-0/12", 3, 40)[:16]), "a higher token limit must only add numbers"
    others = [uniforms(8, "shard-0/12", 3, 16), uniforms(7, "shard-0/1", 3, 16), uniforms(7, "shard-0/12", 2, 16)]
    assert not any((numbers == other).any() for other in others)


def test_uniforms_are_the_top_53_bits_of_the_documented_stream():
    # Pins the numbers across machines and versions: an independent reading of the same bytes.
    stream = hashlib.shake_256(b"7/3/a/b").digest(24)
    expected = [(int.from_bytes(stream[i : i + 8], "little") >> 11) / 2**53 for i in (0, 8, 16)]
    assert uniforms(7, "a/b", 3, 3).tolist() == expected


def test_uniforms_are_uniform_over_rows_and_over_positions():
    numbers = torch.stack([uniforms(1, f"prompt {row}", row % 8, 64) for row in range(256)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    # A fixed draw; 1e-3 is passed by 999 of 1000 uniform samples.
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(numbers[:, 0].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    """Equidistant numbers hit each token in exact proportion: within one count of N times its probability."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).mul(2)
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), grid, sampling=Sampling(temperature=temperature), allowed=ALL)
    expected = (logits[0].double() / temperature).softmax(-1)
    assert (torch.bincount(drawn.tokens, minlength=50) - count * expected).abs().max() <= 1.0
    # Both are float64 computations from the same logits.
    torch.testing.assert_close(drawn.logprobs, expected[drawn.tokens].log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [0.0, 0.3, 1.0 - 2.0**-53])
def test_banned_tokens_are_never_drawn_even_at_the_ends_of_the_distribution(number):
    logits = torch.zeros(1, 6)
    logits[0, [0, 5]] = 30.0
    allowed = torch.tensor([1, 2, 3, 4])
    drawn = draw(logits, torch.tensor([number], dtype=torch.float64), sampling=PLAIN, allowed=allowed)
    assert drawn.tokens.item() == {0.0: 1, 0.3: 2}.get(number, 4)
    greedy = draw(logits, None, sampling=Sampling(temperature=0.0), allowed=allowed)
    assert greedy.tokens.item() == 1


def test_logprobs_are_those_of_the_distribution_over_the_allowed_tokens():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    allowed = torch.tensor([0, 2, 3])
    number = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    drawn = draw(logits, number, sampling=Sampling(temperature=0.8), allowed=allowed)
    scores = logits.double() / 0.8
    rows = torch.arange(3)
    behaviour = scores[:, allowed].log_softmax(-1)[rows, torch.searchsorted(allowed, drawn.tokens)]
    torch.testing.assert_close(drawn.logprobs, behaviour, rtol=0, atol=1e-12)
    # Negative: the excluded mass is no small thing here.
    assert (drawn.logprobs - scores.log_softmax(-1)[rows, drawn.tokens]).abs().min() > 0.1


def test_tokens_of_zero_probability_are_never_drawn():
    # exp(-2000) underflows to zero in float64, in front of, between and behind the tokens that have mass.
    logits = torch.tensor([[-2000.0, 0.0, -2000.0, 0.0, -2000.0]])
    for number, token in [(0.0, 1), (0.5, 3), (1.0 - 2.0**-53, 3)]:
        drawn = draw(logits, torch.tensor([number], dtype=torch.float64), sampling=PLAIN, allowed=torch.arange(5))
        assert drawn.tokens.item() == token


# Filters.

FILTERS = [
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.3, min_p=0.1),
    Sampling(temperature=1.0, min_p=0.02, top_k=12, top_p=0.8),
    Sampling(temperature=1.0, top_k=1000, top_p=1.0),
]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores by transformers' processors, in vLLM's order."""
    processors = LogitsProcessorList()
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double() / sampling.temperature)


@pytest.mark.parametrize("sampling", FILTERS)
def test_filters_keep_what_transformers_processors_keep(sampling):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)).mul(3)
    expected = warped(logits, sampling)
    assert torch.equal(filtered(logits.double() / sampling.temperature, sampling), expected)
    assert expected.isinf().any() == (sampling.top_k != 1000), "the filter must leave something out"


def test_the_order_of_the_filters_is_that_of_vllm():
    """min_p leaves two tokens of 0.4 and 0.3; top_p then counts 0.4 of 0.7, not 0.4 of 1."""
    scores = torch.tensor([[0.4, 0.3, 0.15, 0.15]], dtype=torch.float64).log()
    both = Sampling(temperature=1.0, min_p=0.5, top_p=0.55)
    assert filtered(scores, both).isfinite().tolist() == [[True, False, False, False]]
    assert filtered(scores, Sampling(temperature=1.0, top_p=0.55)).isfinite().tolist() == [[True, True, False, False]]


def test_tokens_that_tie_with_the_last_of_top_k_are_kept():
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    kept = filtered(scores, Sampling(temperature=1.0, top_k=3)).isfinite()
    assert kept.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("sampling", FILTERS[:4])
def test_draws_and_their_logprobs_are_those_of_the_filtered_distribution_over_allowed_tokens(sampling):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4)).mul(2)
    allowed = torch.arange(3, 50)
    expected = torch.zeros(50, dtype=torch.float64)
    expected[allowed] = warped(logits[:, allowed], sampling)[0].softmax(-1)
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), grid, sampling=sampling, allowed=allowed)
    # Equidistant numbers: within one count of N times the probability, and none where it is 0.
    counts = torch.bincount(drawn.tokens, minlength=50)
    assert (counts - count * expected).abs().max() <= 1.0
    assert not counts[expected == 0].any()
    torch.testing.assert_close(drawn.logprobs, expected[drawn.tokens].log(), rtol=0, atol=1e-12)


def test_filters_change_nothing_when_greedy():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(5))
    plain = draw(logits, None, sampling=Sampling(temperature=0.0), allowed=ALL)
    both = draw(logits, None, sampling=Sampling(temperature=0.0, top_k=2, top_p=0.5), allowed=ALL)
    assert torch.equal(plain.tokens, both.tokens)
    assert torch.equal(plain.logprobs, both.logprobs)
