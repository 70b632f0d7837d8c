# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of advantages: against scipy, known values, order of rows, tasks without spread."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from megatron_g2rpo.objective import gaussian_advantages
from megatron_g2rpo.objective.diagnostics import advantage_diagnostics, normal_distance


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def integrated_distance(values: np.ndarray) -> float:
    """The definition by quadrature, in x instead of u: the integral of |F_n(x) - Phi(x)| between the steps of F_n and
    from there to 40, beyond which nothing of N(0, 1) is left."""
    edges = np.concatenate([[-40.0], np.sort(values), [40.0]])
    total = 0.0
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        level = k / len(values)
        # The integrand has a kink where Phi meets the level; quad is told of it, and of where Phi lives.
        kinks = [x for x in (stats.norm.ppf(level), -5.0, 0.0, 5.0) if a < x < b]
        if a < b:
            total += integrate.quad(
                lambda x, level=level: abs(level - stats.norm.cdf(x)), a, b, points=kinks or None, epsabs=1e-12
            )[0]
    return total


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [3.0],
        [-1.5, -1.5, 0.2, 7.0],
        [-0.5, -0.5, -0.5, -0.5, 2.0],
        [-30.0, 30.0],
        list(np.random.default_rng(0).normal(size=60)),
        list(np.random.default_rng(1).exponential(size=33) - 1),
    ],
)
def test_the_distance_is_its_integral(values: list[float]) -> None:
    """1e-10: quad asks for 1e-12 on each of up to 61 pieces."""
    assert normal_distance(tensor(values)) == pytest.approx(integrated_distance(np.array(values)), abs=1e-10)


def test_known_distances() -> None:
    """Constants c are E|Z - c|: sqrt(2 / pi) for 0, and c itself far out. -m and m, half each, are E||Z| - m|; with
    m the median of |Z|, that is 4 phi(m) - 2 phi(0). 1e-14: a few operations on numbers of order 1."""
    assert normal_distance(tensor([0.0] * 7)) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-14)
    assert normal_distance(tensor([1e6])) == pytest.approx(1e6, rel=1e-14)
    m = stats.norm.ppf(0.75)
    expected = 4 * stats.norm.pdf(m) - 2 * stats.norm.pdf(0)
    assert normal_distance(tensor([-m, m])) == pytest.approx(expected, abs=1e-14)


def test_gaussian_advantages_of_distinct_rewards_approach_the_normal_distribution() -> None:
    """Midpoint quantiles are the medians of their steps, the best n values there are; standardised rewards of a skewed
    distribution stay away, however many."""
    previous = math.inf
    for n in (8, 64, 4096):
        rewards, ids = tensor(np.random.default_rng(n).exponential(size=n)), torch.zeros(n, dtype=torch.int64)
        distance = normal_distance(gaussian_advantages(rewards, ids, ids, stages=["task"]))
        assert distance < 0.3 * previous
        previous = distance
        assert normal_distance((rewards - rewards.mean()) / rewards.std(correction=0)) > 2 * distance


def test_moments_and_quantiles_are_numpys_and_scipys_by_task() -> None:
    """1e-13: sums of 40 numbers of order 1 to 10, in another order."""
    rng = np.random.default_rng(3)
    advantages, tasks = rng.exponential(size=120), rng.permutation(np.repeat([-4, 9, 2**62], 40))
    found = advantage_diagnostics(tensor(advantages), torch.from_numpy(tasks))
    assert found.task.tolist() == [-4, 9, 2**62]
    for k, task in enumerate(found.task.tolist()):
        own = advantages[tasks == task]
        expected = [own.mean(), own.std(), stats.skew(own), *np.quantile(own, [0.05, 0.5, 0.95])]
        actual = [column[k] for column in (found.mean, found.std, found.skew, found.q05, found.q50, found.q95)]
        np.testing.assert_allclose(actual, expected, atol=1e-13, rtol=1e-13)
        assert found.normal_distance[k] == normal_distance(tensor(own))


def test_a_task_without_spread_has_no_skew_and_no_rows_have_no_tasks() -> None:
    constant = advantage_diagnostics(torch.zeros(3, dtype=torch.float32), torch.tensor([5, 5, 5]))
    assert (constant.std.item(), constant.skew.item(), constant.q95.item()) == (0.0, 0.0, 0.0)
    assert constant.normal_distance.item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-14)
    empty = advantage_diagnostics(tensor([]), torch.zeros(0, dtype=torch.int64))
    for column in dataclasses.fields(empty):
        assert getattr(empty, column.name).shape == (0,)


def test_order_of_rows_does_not_change_a_bit() -> None:
    rng = np.random.default_rng(4)
    advantages, tasks = tensor(rng.normal(size=200)), torch.from_numpy(rng.integers(0, 3, 200))
    expected = advantage_diagnostics(advantages, tasks)
    for seed in range(5):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(200))
        actual = advantage_diagnostics(advantages[order], tasks[order])
        for column in dataclasses.fields(actual):
            assert torch.equal(getattr(actual, column.name), getattr(expected, column.name)), column.name
