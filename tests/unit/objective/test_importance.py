# SPDX-License-Identifier: Apache-2.0
"""The gap between engine and trainer: weights, sequence masks and sums against loops; directions by enumeration."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_g2rpo.objective import importance
from megatron_g2rpo.objective.importance import GapSums
from megatron_g2rpo.objective.sequences import Sequences
from tests.unit.objective.shares import on_two_ranks


def tokens(size: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """(behaviour, rollout), float64 [S], with gradient."""
    generator = torch.Generator().manual_seed(0)
    rollout = -5 * torch.rand(size, dtype=torch.float64, generator=generator)
    behaviour = rollout + spread * torch.randn(size, dtype=torch.float64, generator=generator)
    return behaviour.requires_grad_(), rollout.requires_grad_()


def two_distributions() -> tuple[Tensor, Tensor]:
    """Log-probabilities [V] of every outcome under the trainer and under the engine."""
    logits = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trainer, engine = logits.log_softmax(-1)
    return trainer, engine


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_weights_are_the_ratio_up_to_the_cap_and_carry_no_gradient(cap: float) -> None:
    behaviour, rollout = tokens(100)
    weights = importance.truncated_weights(behaviour, rollout, cap=cap)
    pairs = zip(behaviour.tolist(), rollout.tolist(), strict=True)
    expected = [min(math.exp(own) / math.exp(theirs), cap) for own, theirs in pairs]
    assert 0 < sum(weight == cap for weight in expected) < 100
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0)
    assert not weights.requires_grad


def test_weights_turn_means_of_the_engine_into_means_of_the_trainer() -> None:
    """Without truncation, over all outcomes: the direction of the ratio."""
    trainer, engine = two_distributions()
    values = torch.arange(6, dtype=torch.float64)
    weights = importance.truncated_weights(trainer, engine, cap=1e6)
    torch.testing.assert_close(
        (engine.exp() * weights * values).sum(), (trainer.exp() * values).sum(), rtol=1e-12, atol=0
    )


def test_extreme_gaps_give_finite_weights_in_float32() -> None:
    weights = importance.truncated_weights(
        torch.tensor([0.0, -200.0, 0.0]), torch.tensor([-200.0, 0.0, -torch.inf]), cap=2.0
    )
    assert weights.tolist() == [2.0, 0.0, 2.0]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(behaviour, rollout, ids, N, rank of each token), empty sequences, ranks and rows included."""
    size, length = draw(st.integers(1, 4)), draw(st.integers(0, 12))
    ids, gaps, rollout, ranks = (
        draw(st.lists(elements, min_size=length, max_size=length))
        for elements in (st.integers(-1, size - 1), st.floats(-1, 1), st.floats(-5, 0), st.integers(0, 1))
    )
    gaps, rollout = (torch.tensor(column, dtype=torch.float64) for column in (gaps, rollout))
    ids, ranks = (torch.tensor(column, dtype=torch.int64) for column in (ids, ranks))
    return rollout + gaps, rollout, ids, size, ranks


@given(row=rows())
@settings(deadline=None)
def test_sequences_are_kept_whole_by_their_geometric_mean_ratio_on_one_rank_and_on_two(
    row: tuple[Tensor, Tensor, Tensor, int, Tensor],
) -> None:
    behaviour, rollout, ids, size, ranks = row
    members: dict[int, list[float]] = {}
    for index, own, theirs in zip(ids.tolist(), behaviour.tolist(), rollout.tolist(), strict=True):
        members.setdefault(index, []).append(own - theirs)
    means = {index: sum(gaps) / len(gaps) for index, gaps in members.items()}
    # A mean that rounding could put on either side of a bound says nothing.
    bounds = (math.log(0.8), math.log(1.25))
    if any(abs(mean - bound) < 1e-9 for mean in means.values() for bound in bounds):
        return
    kept = [index >= 0 and bounds[0] <= means[index] <= bounds[1] for index in ids.tolist()]
    expected = torch.tensor(kept, dtype=torch.bool)

    def within(sequences: Sequences, own: Tensor) -> Tensor:
        return importance.sequences_within(behaviour[own], rollout[own], sequences, low=0.8, high=1.25)

    assert torch.equal(within(Sequences(ids=ids, size=size), torch.ones_like(ids, dtype=torch.bool)), expected)
    for rank, found in enumerate(on_two_ranks(ids, size, ranks, within)):
        assert torch.equal(found, expected[ranks == rank])


def test_bounds_belong_to_the_interval_and_extreme_gaps_do_not() -> None:
    behaviour = torch.tensor([-1.0, -2.0, 0.0, -1e4, 0.0])
    rollout = torch.tensor([-2.0, -1.0, 0.0, 0.0, -1e4])
    sequences = Sequences(ids=torch.tensor([0, 0, 1, 2, 3]), size=4)
    kept = importance.sequences_within(behaviour, rollout, sequences, low=1.0, high=1.0)
    assert kept.tolist() == [True, True, True, False, False]
    kept = importance.sequences_within(behaviour, rollout, sequences, low=0.0, high=math.inf)
    assert kept.tolist() == [True] * 5


def gaps_by_loop(behaviour: Tensor, rollout: Tensor, task_ids: Tensor, mask: Tensor, num_tasks: int) -> GapSums:
    count, absolute, kl, largest = ([0.0] * num_tasks for _ in range(4))
    columns = (behaviour.tolist(), rollout.tolist(), task_ids.tolist(), mask.tolist())
    for own, theirs, task, kept in zip(*columns, strict=True):
        if kept:
            count[task] += 1
            absolute[task] += abs(own - theirs)
            kl[task] += math.exp(own) / math.exp(theirs) - 1 - (own - theirs)
            largest[task] = max(largest[task], abs(own - theirs))
    sums = (torch.tensor(column, dtype=torch.float64) for column in (count, absolute, kl, largest))
    return GapSums(**dict(zip(("count", "absolute", "kl", "largest"), sums, strict=True)))


def assert_same(found: GapSums, expected: GapSums) -> None:
    """float64, some tens of terms in another order: 1e-12."""
    for field in fields(GapSums):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=1e-12, atol=1e-12)


def test_gap_sums_equal_a_loop_and_add_up_over_micro_batches() -> None:
    """Task 2 has no tokens; masked tokens have no task and may hold anything. One micro-batch is empty."""
    behaviour, rollout = tokens(60)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(60, generator=generator) < 0.7).float()
    task_ids = torch.where(mask != 0, torch.tensor([0, 1, 3])[torch.randint(0, 3, (60,), generator=generator)], -1)
    spoilt = torch.where(mask != 0, behaviour, torch.nan)
    expected = gaps_by_loop(behaviour, rollout, task_ids, mask, 4)
    assert expected.count[2] == 0
    whole = importance.gap_sums(spoilt, rollout, task_ids, mask, 4)
    assert_same(whole, expected)
    assert not any(getattr(whole, field.name).requires_grad for field in fields(GapSums))
    assert all(getattr(whole, field.name).dtype == torch.float64 for field in fields(GapSums))

    total = importance.gap_sums(spoilt[:0], rollout[:0], task_ids[:0], mask[:0], 4)
    for part in torch.arange(60).split(25):
        total = total.merge(importance.gap_sums(spoilt[part], rollout[part], task_ids[part], mask[part], 4))
    assert_same(total, expected)


def test_the_mean_kl_is_that_of_the_engine_to_the_trainer() -> None:
    """Over all outcomes, each as likely as under the engine, which sampled them."""
    trainer, engine = two_distributions()
    # One task per outcome, so that the sums can be weighed with its probability.
    sums = importance.gap_sums(trainer, engine, torch.arange(6), torch.ones(6), 6)
    expected = (engine.exp() * (engine - trainer)).sum()
    torch.testing.assert_close((engine.exp() * sums.kl).sum(), expected, rtol=1e-12, atol=0.0)
    opposite = (trainer.exp() * (trainer - engine)).sum()
    assert abs(opposite - expected) > 0.01


def test_one_extreme_token_keeps_the_sums_finite_and_is_reported_in_full() -> None:
    behaviour, rollout = torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])
    sums = importance.gap_sums(behaviour, rollout, torch.tensor([0, 1]), torch.ones(2), 2)
    assert sums.absolute.tolist() == sums.largest.tolist() == [1e4, 1e4]
    assert sums.kl.tolist() == pytest.approx([math.exp(20) - 21, math.exp(-20) + 19])


def test_options_out_of_range_are_errors() -> None:
    zeros, sequences = torch.zeros(2), Sequences(ids=torch.zeros(2, dtype=torch.int64), size=1)
    for cap in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="cap"):
            importance.truncated_weights(zeros, zeros, cap=cap)
    for low, high, name in ((-0.1, 2.0, "low"), (1.1, 2.0, "low"), (math.nan, 2.0, "low"), (0.5, 0.9, "high")):
        with pytest.raises(ValueError, match=name):
            importance.sequences_within(zeros, zeros, sequences, low=low, high=high)


def test_shapes_that_would_broadcast_and_tasks_out_of_range_are_errors() -> None:
    zeros, one = torch.zeros(2), torch.zeros(1)
    sequences = Sequences(ids=torch.zeros(2, dtype=torch.int64), size=1)
    with pytest.raises(ValueError, match="one shape"):
        importance.truncated_weights(zeros, one, cap=2.0)
    with pytest.raises(ValueError, match="one shape"):
        importance.sequences_within(zeros, one, sequences, low=0.5, high=2.0)
    with pytest.raises(ValueError, match="shape of ids"):
        importance.sequences_within(one, one, sequences, low=0.5, high=2.0)
    with pytest.raises(ValueError, match="one shape"):
        importance.gap_sums(zeros, zeros, zeros.long(), one, 1)
    for task in (-1, 1):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            importance.gap_sums(zeros, zeros, torch.tensor([0, task]), torch.ones(2), 1)
