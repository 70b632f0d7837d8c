# SPDX-License-Identifier: Apache-2.0
"""Claim: sums and means over sequences are those of a loop over tokens, however the tokens are spread over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from tests.unit.objective.shares import on_two_ranks


def by_loop(ids: Tensor, values: Tensor, size: int) -> list[Tensor]:
    """[sum [N], count [N], mean of its sequence at each token [S]], added up in Python: the oracle."""
    members: list[list[float]] = [[] for _ in range(size)]
    for index, value in zip(ids.tolist(), values.tolist(), strict=True):
        if index >= 0:
            members[index].append(value)
    sums, counts = [sum(member) for member in members], [len(member) for member in members]
    means = [sums[index] / counts[index] if index >= 0 else 0.0 for index in ids.tolist()]
    return [torch.tensor(column, dtype=torch.float64) for column in (sums, counts, means)]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor]:
    """(ids [S], values [S], N, rank of each token [S]); sequences without tokens and ranks without tokens occur."""
    size, length = draw(st.integers(1, 4)), draw(st.integers(0, 12))
    ids, values, ranks = (
        draw(st.lists(elements, min_size=length, max_size=length))
        for elements in (st.integers(-1, size - 1), st.floats(-30, 0), st.integers(0, 1))
    )
    return (
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float64),
        size,
        torch.tensor(ranks, dtype=torch.int64),
    )


@given(row=rows())
@settings(deadline=None)
def test_sums_counts_and_means_equal_a_loop_on_one_rank_and_on_two(row: tuple[Tensor, Tensor, int, Tensor]) -> None:
    """float64; up to twelve terms, added in another order: 1e-12 of values up to 30."""
    ids, values, size, ranks = row
    sums, counts, means = by_loop(ids, values, size)

    def results(sequences: Sequences, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sequences.sum(values[own]), sequences.counts(), sequences.mean(values[own])

    everything = torch.ones_like(ids, dtype=torch.bool)
    cases = [(everything, results(Sequences(ids=ids, size=size), everything))]
    cases += zip((ranks == 0, ranks == 1), on_two_ranks(ids, size, ranks, results), strict=True)
    for own, found in cases:
        for result, expected in zip(found, (sums, counts, means[own]), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_accumulates_in_float64_and_returns_means_in_the_type_of_the_values() -> None:
    """In float32 the sum would lose every 1: 2**25 + 1 rounds back to 2**25."""
    values = torch.tensor([2.0**25, 1.0, 1.0, 1.0])
    sequences = Sequences(ids=torch.zeros(4, dtype=torch.int64), size=1)
    assert sequences.sum(values).tolist() == [2.0**25 + 3]
    assert sequences.mean(values).dtype == torch.float32
    assert sequences.mean(torch.tensor([1.0, 2.0, 3.0, 6.0])).tolist() == [3.0] * 4


def test_what_is_summed_carries_no_gradient_and_is_reduced_once_per_call_without_one() -> None:
    calls = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return tensor

    values = torch.tensor([1.0, 2.0], requires_grad=True)
    sequences = Sequences(ids=torch.tensor([0, -1]), size=1, reduce=reduce)
    results = [sequences.sum(values), sequences.mean(values), sequences.counts()]
    assert not any(result.requires_grad for result in results)
    assert calls == [False] * 3


def test_a_rank_without_tokens_still_takes_part_in_the_collective() -> None:
    calls = []
    empty = Sequences(ids=torch.zeros(0).long(), size=2, reduce=lambda sums: calls.append(sums.shape) or sums + 1)
    assert empty.sum(torch.zeros(0)).tolist() == [1.0, 1.0]
    assert empty.mean(torch.zeros(0)).shape == (0,)
    assert len(calls) == 2


def test_not_a_number_outside_every_sequence_stays_outside() -> None:
    sequences = Sequences(ids=torch.tensor([0, -1, 0]), size=1)
    assert sequences.mean(torch.tensor([1.0, torch.nan, 2.0])).tolist() == [1.5, 0.0, 1.5]


@pytest.mark.parametrize("ids", [[0, 2], [0, -2]])
def test_ids_of_no_sequence_are_errors(ids: list[int]) -> None:
    with pytest.raises((IndexError, RuntimeError), match="index"):
        Sequences(ids=torch.tensor(ids), size=2).sum(torch.zeros(2))


def test_wrong_shapes_and_types_are_errors() -> None:
    with pytest.raises(ValueError, match="shape of ids"):
        Sequences(ids=torch.tensor([0, 0]), size=1).sum(torch.zeros(1))
    with pytest.raises(ValueError, match="int64"):
        Sequences(ids=torch.tensor([0.0]), size=1)
    with pytest.raises(ValueError, match="int64"):
        Sequences(ids=torch.zeros(1, 1).long(), size=1)
