# SPDX-License-Identifier: Apache-2.0
"""Group statistics: values against numpy, extremes, order of rows, errors; on both implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_g2rpo.objective import group_statistics


def test_statistics_are_those_of_numpy_by_ascending_id(implementation: str) -> None:
    """Moments within 1e-14: both are exact to rounding for values of order 1."""
    rng = np.random.default_rng(0)
    rewards, groups = rng.integers(0, 4, 60) / 3, rng.choice([-7, 2**62, 3], 60)
    tasks = np.where(groups == 3, 11, 10)
    statistics = group_statistics(rewards, groups, tasks)
    for sets, ids in ((statistics.groups, groups), (statistics.tasks, tasks)):
        members = [rewards[ids == set_id] for set_id in np.unique(ids)]
        np.testing.assert_array_equal(sets.id, np.unique(ids))
        np.testing.assert_array_equal(sets.count, [len(m) for m in members])
        np.testing.assert_array_equal(sets.distinct, [len(np.unique(m)) for m in members])
        np.testing.assert_array_equal(sets.min, [m.min() for m in members])
        np.testing.assert_array_equal(sets.max, [m.max() for m in members])
        np.testing.assert_allclose(sets.mean, [m.mean() for m in members], atol=1e-14, rtol=0)
        np.testing.assert_allclose(sets.std, [m.std() for m in members], atol=1e-14, rtol=0)


def test_equal_rewards_have_exactly_their_mean_and_no_spread(implementation: str) -> None:
    """0.1 has no exact binary form: a plain sum of seven of them, divided by seven, is another number."""
    zeros = np.zeros(7, dtype=np.int64)
    sets = group_statistics(np.full(7, 0.1), zeros, zeros).groups
    assert (sets.mean.item(), sets.std.item(), sets.distinct.item()) == (0.1, 0.0, 1)
    assert sets.zero_variance.tolist() == [True]


def test_distinct_counts_rewards_within_the_tolerance_once(implementation: str) -> None:
    zeros = np.zeros(4, dtype=np.int64)
    rewards = np.array([0.5, 0.5 + 1e-9, 0.5 + 2e-6, 0.9])
    assert group_statistics(rewards, zeros, zeros).groups.distinct.item() == 3
    assert group_statistics(rewards, zeros, zeros, tie_tolerance=0.0).groups.distinct.item() == 4


@pytest.mark.parametrize("magnitude", [1.7e308, 1e200, 1e-200, 5e-324])
def test_moments_neither_overflow_nor_vanish(implementation: str, magnitude: float) -> None:
    zeros = np.zeros(2, dtype=np.int64)
    sets = group_statistics(np.array([magnitude, -magnitude]), zeros, zeros).groups
    assert (sets.mean.item(), sets.std.item()) == (0.0, magnitude)


def test_order_of_rows_does_not_change_a_bit(implementation: str) -> None:
    rng = np.random.default_rng(2)
    rewards, groups = rng.normal(size=200), rng.integers(0, 5, 200)
    expected = group_statistics(rewards, groups, groups).groups
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(200)
        actual = group_statistics(rewards[order], groups[order], groups[order]).groups
        for name in ("mean", "std", "min", "max"):
            assert torch.equal(getattr(actual, name).view(torch.int64), getattr(expected, name).view(torch.int64)), name


def test_zeros_of_either_sign_are_one_value_whatever_their_order(implementation: str) -> None:
    """They compare equal, so that a sort leaves the order of the rows to decide which of them is the smallest."""
    zeros = np.zeros(2, dtype=np.int64)
    for rewards in ([0.0, -0.0], [-0.0, 0.0]):
        sets = group_statistics(np.array(rewards), zeros, zeros).groups
        assert not np.signbit([sets.min.item(), sets.max.item(), sets.mean.item()]).any()


def test_no_rows_have_no_sets_and_bad_rows_are_named(implementation: str) -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert len(group_statistics(np.zeros(0), empty, empty).tasks.id) == 0
    with pytest.raises(ValueError, match=r"row 1 is inf \(group 8, task 9\)"):
        group_statistics(np.array([0.0, np.inf]), np.array([8, 8]), np.array([9, 9]))
    with pytest.raises(ValueError, match="tie_tolerance"):
        group_statistics(np.zeros(0), empty, empty, tie_tolerance=-1.0)
