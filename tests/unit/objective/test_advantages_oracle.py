# SPDX-License-Identifier: Apache-2.0
"""Claim: the compiled op and the torch implementation agree to 1e-12 on whatever rows hypothesis finds.

Few rows with the nastiest values, where a failure shrinks to something readable; and batches in which single sets are
large enough for each way the op has of finding distinct values: few distinct ones, many, and small sets in between.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_g2rpo.objective import advantages, gaussian_advantages, group_statistics

pytestmark = pytest.mark.skipif(advantages.backend() != "cpp", reason="the compiled op is not built here")

INT64 = np.iinfo(np.int64)
IDS = st.one_of(st.sampled_from([INT64.min, -1, 0, 1, 2**32, INT64.max]), st.integers(INT64.min, INT64.max))
REWARDS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 0.1 + 1e-9, 0.1 + 1e-6, 0.5, 1.0, 5e-324, -5e-324, 2.0**-1022, 1.7e308, -1.7e308]),
    st.floats(-2.0, 2.0, width=32),
    st.floats(allow_nan=False, allow_infinity=False),
)
ROWS = st.lists(st.tuples(REWARDS, IDS, IDS), max_size=40)
OPTIONS = st.fixed_dictionaries(
    {
        "stages": st.sampled_from([["group"], ["task"], ["group", "task"], ["task", "group"]]),
        # Not 0: in a second stage the two would have to agree to the last bit for the same values to tie.
        "tie_tolerance": st.sampled_from([1e-9, 1e-6, 0.25]),
        "zero_variance": st.sampled_from(["drop", "keep"]),
        "variance": st.sampled_from(["as_is", "unit"]),
    }
)
FIXED = settings(max_examples=150, deadline=None, derandomize=True)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
VALUES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "continuous": lambda rng, n: rng.normal(size=n),
    "binary": lambda rng, n: rng.integers(0, 2, n).astype(float),
    "grid": lambda rng, n: rng.integers(0, 101, n) / 100,
    "near ties": lambda rng, n: rng.integers(0, 9, n) / 8 + rng.integers(-4, 5, n) * 4e-7,
    "all magnitudes": lambda rng, n: 10.0 ** rng.uniform(-324, 308, n) * rng.choice([-1, 1], n),
    "signed zeros": lambda rng, n: rng.choice([-0.0, 0.0, 5e-324, -5e-324, 1.0], n),
}


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to 3,000 rows: groups and tasks of 1 to 1,000 rows, in runs or scattered, ids from all of int64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = rng.integers(1, draw(st.sampled_from([1, 8, 40, 200, 1000])) + 1, draw(st.integers(1, 12)))
    n = int(sizes.sum())
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rewards = VALUES[draw(st.sampled_from(sorted(VALUES)))](rng, n)
    rewards = np.clip(rewards, np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype)
    ids = np.concatenate([[INT64.min, INT64.max], rng.integers(INT64.min, INT64.max, len(sizes))])
    ids = np.sort(ids) if draw(st.booleans()) else ids  # ascending ids have a shorter way through the op
    groups = np.repeat(ids[: len(sizes)], sizes)
    tasks = np.repeat(rng.choice(ids[: draw(st.integers(1, 3))], len(sizes)), sizes)
    order = rng.permutation(n) if draw(st.booleans()) else np.arange(n)
    return rewards[order], groups[order], tasks[order]


def columns(rows: list[tuple[float, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rewards, groups, tasks = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(rewards, np.float64), np.array(groups, np.int64), np.array(tasks, np.int64)


def on_torch(function: Callable[..., Any], *rows: np.ndarray, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantages, "_extension", None)
        return function(*rows, **options)


def check_advantages(batch: Batch, options: dict[str, Any], order: np.ndarray) -> None:
    compiled = gaussian_advantages(*batch, **options).numpy()
    np.testing.assert_allclose(on_torch(gaussian_advantages, *batch, **options), compiled, atol=1e-12, rtol=0)

    shuffled = gaussian_advantages(*(column[order] for column in batch), **options).numpy()
    np.testing.assert_array_equal(shuffled.view(np.int64), compiled[order].view(np.int64))


def check_statistics(batch: Batch, tolerance: float, order: np.ndarray) -> None:
    """Moments within 1e-12 of the largest reward of the set: sums run in another order. The rest is exact."""
    compiled = group_statistics(*batch, tie_tolerance=tolerance)
    reference = on_torch(group_statistics, *batch, tie_tolerance=tolerance)
    shuffled = group_statistics(*(column[order] for column in batch), tie_tolerance=tolerance)
    for ours, theirs, again in (
        (compiled.groups, reference.groups, shuffled.groups),
        (compiled.tasks, reference.tasks, shuffled.tasks),
    ):
        for name in ("id", "count", "distinct", "min", "max"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        size = torch.maximum(ours.min.abs(), ours.max.abs())
        for name in ("mean", "std"):
            assert ((getattr(ours, name) - getattr(theirs, name)).abs() <= 1e-12 * size).all(), name
        for name in ("id", "count", "distinct", "min", "max", "mean", "std"):
            assert torch.equal(getattr(ours, name).view(torch.int64), getattr(again, name).view(torch.int64)), name


def permutation(n: int, random: Random) -> np.ndarray:
    return np.array(random.sample(range(n), n), dtype=np.int64)


@FIXED
@given(ROWS, OPTIONS, st.randoms(use_true_random=False))
def test_advantages_agree_and_do_not_depend_on_the_order_of_rows(rows, options, random):
    check_advantages(columns(rows), options, permutation(len(rows), random))


@FIXED
@given(batches(), OPTIONS, st.randoms(use_true_random=False))
def test_advantages_of_large_sets_agree_and_do_not_depend_on_the_order_of_rows(batch, options, random):
    check_advantages(batch, options, permutation(len(batch[0]), random))


@FIXED
@given(ROWS, st.sampled_from([0.0, 1e-6, 0.25]), st.randoms(use_true_random=False))
def test_statistics_agree_and_do_not_depend_on_the_order_of_rows(rows, tolerance, random):
    check_statistics(columns(rows), tolerance, permutation(len(rows), random))


@FIXED
@given(batches(), st.sampled_from([0.0, 1e-6, 0.25]), st.randoms(use_true_random=False))
def test_statistics_of_large_sets_agree_and_do_not_depend_on_the_order_of_rows(batch, tolerance, random):
    check_statistics(batch, tolerance, permutation(len(batch[0]), random))
