# SPDX-License-Identifier: Apache-2.0
"""Claim: the compiled op and the torch implementation agree to 1e-12 on whatever rows hypothesis finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_g2rpo.objective import advantages, gaussian_advantages, group_statistics

pytestmark = pytest.mark.skipif(advantages.backend() != "cpp", reason="the compiled op is not built here")

IDS = st.sampled_from([-(2**63), -1, 0, 1, 2**32, 2**63 - 1])
REWARDS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 0.1 + 1e-9, 0.1 + 1e-6, 0.5, 1.0]),
    st.floats(-2.0, 2.0, width=32),
    st.floats(allow_nan=False, allow_infinity=False),
)
ROWS = st.lists(st.tuples(REWARDS, IDS, IDS), max_size=40)
FIXED = settings(max_examples=150, deadline=None, derandomize=True)


def columns(rows: list[tuple[float, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rewards, groups, tasks = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(rewards, np.float64), np.array(groups, np.int64), np.array(tasks, np.int64)


def on_torch(function, *rows, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantages, "_extension", None)
        return function(*rows, **options)


@FIXED
@given(
    ROWS,
    st.sampled_from([["group"], ["task"], ["group", "task"], ["task", "group"]]),
    # Not 0: in a second stage the two would have to agree to the last bit for the same values to tie.
    st.sampled_from([1e-9, 1e-6, 0.25]),
    st.sampled_from(["drop", "keep"]),
    st.sampled_from(["as_is", "unit"]),
    st.randoms(use_true_random=False),
)
def test_advantages_agree_and_do_not_depend_on_the_order_of_rows(rows, stages, tolerance, zero, variance, random):
    options = {"stages": stages, "tie_tolerance": tolerance, "zero_variance": zero, "variance": variance}
    batch = columns(rows)
    compiled = gaussian_advantages(*batch, **options).numpy()
    np.testing.assert_allclose(on_torch(gaussian_advantages, *batch, **options), compiled, atol=1e-12, rtol=0)

    order = np.array(random.sample(range(len(rows)), len(rows)), dtype=np.int64)
    shuffled = gaussian_advantages(*(column[order] for column in batch), **options).numpy()
    np.testing.assert_array_equal(shuffled.view(np.int64), compiled[order].view(np.int64))


@FIXED
@given(ROWS, st.sampled_from([0.0, 1e-6, 0.25]))
def test_statistics_agree(rows, tolerance):
    """Moments within 1e-12 of the largest reward of the set: sums run in another order. The rest is exact."""
    batch = columns(rows)
    compiled, reference = (
        group_statistics(*batch, tie_tolerance=tolerance),
        on_torch(group_statistics, *batch, tie_tolerance=tolerance),
    )
    for ours, theirs in ((compiled.groups, reference.groups), (compiled.tasks, reference.tasks)):
        for name in ("id", "count", "distinct", "min", "max"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        size = torch.maximum(ours.min.abs(), ours.max.abs())
        for name in ("mean", "std"):
            assert ((getattr(ours, name) - getattr(theirs, name)).abs() <= 1e-12 * size).all(), name
