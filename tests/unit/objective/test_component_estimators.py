# SPDX-License-Identifier: Apache-2.0
"""Values of the estimators that read the components of the reward: by hand, and against independent statements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from megatron_g2rpo.objective import estimators
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import as_reward_batch

Parts = dict[str, list[float]]
FIXED = settings(max_examples=150, deadline=None, derandomize=True)
IDS = st.integers(0, 3)
VALUES = st.sampled_from([0.0, 0.3, 0.5, 1.0])
ROWS = st.lists(st.tuples(VALUES, VALUES, VALUES, IDS, IDS), min_size=1, max_size=40)
WEIGHTS = {"accuracy": 0.9, "format": 0.1, "length": 0.37}


def advantages(
    name: str,
    parts: Parts,
    groups: object = None,
    tasks: object = None,
    *,
    part_weights: dict[str, float] | None = None,
    **options: object,
) -> np.ndarray:
    """Of one group and one task where none are given."""
    columns = {key: np.asarray(values, dtype=np.float64) for key, values in parts.items()}
    zeros = np.zeros(len(next(iter(columns.values()))), dtype=np.int64)
    ids = [zeros if column is None else np.asarray(column, dtype=np.int64) for column in (groups, tasks)]
    # The rewards themselves are not read.
    batch = as_reward_batch(zeros.astype(np.float64), *ids, columns, part_weights)
    return estimators.bind(name, **options)(batch, History()).numpy()


def transported(values: np.ndarray, ids: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The optimal-transport map within each set of active values, from the definition: ties share a mean."""
    images = np.zeros(len(values))
    for key in np.unique(ids[active]):
        members = np.flatnonzero((ids == key) & active)
        ordered, quantiles = np.sort(values[members]), norm.ppf((np.arange(len(members)) + 0.5) / len(members))
        images[members] = [quantiles[ordered == value].mean() for value in values[members]]
    return images


def two_stages(parts: dict[str, np.ndarray], weights: dict[str, float], groups, tasks, drop: bool) -> np.ndarray:
    """Values are rounded between the stages, so that equal ones are bit-equal."""
    everything = np.ones(len(groups), dtype=bool)
    total = sum(weights[name] * transported(part, groups, everything) for name, part in parts.items() if weights[name])
    spread = [any(np.ptp(parts[name][groups == g]) > 0 for name in parts if weights[name]) for g in groups]
    return transported(np.round(total, 9), tasks, np.array(spread) if drop else everything)


def test_gdpo_by_hand() -> None:
    """accuracy becomes -1 -1 1 1 and format -1 1 -1 1; twice the one and once the other -3 -1 1 3, whose variance is 5.
    The sum of the raw rewards would have been dominated by format. Then a second group, in which format does not vary
    and adds 0: -2 -2 2 2, and of all eight the variance is 9/2. 1e-15: roundings."""
    first = {"accuracy": [0, 0, 1, 1], "format": [10, 90, 10, 90]}
    weights = {"accuracy": 2.0, "format": 1.0}
    actual = advantages("gdpo", first, part_weights=weights)
    np.testing.assert_allclose(actual, np.array([-3, -1, 1, 3]) / math.sqrt(5), atol=1e-15)
    both = {"accuracy": [*first["accuracy"], 0.2, 0.2, 0.4, 0.4], "format": [*first["format"], 1, 1, 1, 1]}
    actual = advantages("gdpo", both, groups=[0] * 4 + [1] * 4, part_weights=weights)
    np.testing.assert_allclose(actual, np.array([-3, -1, 1, 3, -2, -2, 2, 2]) / math.sqrt(4.5), atol=1e-15)


@FIXED
@given(ROWS)
def test_gdpo_is_its_definition(rows) -> None:
    """1e-9 where there is spread: sums of up to 40 numbers of order 1, divided by a standard deviation that is not
    near 0. Sums that cancel up to rounding have no spread."""
    accuracy, form, length, groups, tasks = map(np.array, zip(*rows, strict=True))
    parts, total = {"accuracy": accuracy, "format": form, "length": length}, np.zeros(len(groups))
    for name, part in parts.items():
        for g in np.unique(groups):
            own = part[groups == g]
            if np.ptp(own) > 0:
                total[groups == g] += WEIGHTS[name] * (own - own.mean()) / own.std()
    expected = (total - total.mean()) / total.std() if np.ptp(total) > 1e-9 else np.zeros(len(total))
    actual = advantages("gdpo", parts, groups, tasks, part_weights=WEIGHTS)
    np.testing.assert_allclose(actual, expected, atol=1e-9, rtol=0)


def test_g2_gdpo_by_hand() -> None:
    """Quantiles of four are +-1.1503 and +-0.3186, of which two ties share 0.7345. Components at -1 -1 1 1 and
    -1 1 -1 1 times that, weighed 2 and 1, have the order of the rows, as -3 -1 1 3. Weighed alike, the two in the
    middle tie at 0. To 4 digits."""
    parts = {"accuracy": [0, 0, 1, 1], "format": [10, 90, 10, 90]}
    actual = advantages("g2_gdpo", parts, part_weights={"accuracy": 2.0, "format": 1.0})
    np.testing.assert_allclose(actual, [-1.1503, -0.3186, 0.3186, 1.1503], atol=5e-5)
    np.testing.assert_allclose(advantages("g2_gdpo", parts), [-1.1503, 0, 0, 1.1503], atol=5e-5)


@FIXED
@given(ROWS, st.sampled_from(["drop", "keep"]), st.sampled_from([0.37, 0.0]))
def test_g2_gdpo_is_an_independent_statement_of_its_two_stages(rows, zero_variance: str, length_weight: float) -> None:
    """1e-12, the tolerance of the quantiles: between the stages only ranks are handed on."""
    accuracy, form, length, groups, tasks = map(np.array, zip(*rows, strict=True))
    parts, weights = {"accuracy": accuracy, "format": form, "length": length}, {**WEIGHTS, "length": length_weight}
    expected = two_stages(parts, weights, groups, tasks, drop=zero_variance == "drop")
    actual = advantages("g2_gdpo", parts, groups, tasks, part_weights=weights, zero_variance=zero_variance)
    np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=0)


@FIXED
@given(ROWS, st.sampled_from(["drop", "keep"]), st.sampled_from(["as_is", "unit"]))
def test_g2_gdpo_of_one_component_is_g2rpo_of_it(rows, zero_variance: str, variance: str) -> None:
    """Bit for bit, and so are components of weight 0 absent."""
    accuracy, form, _, groups, tasks = map(np.array, zip(*rows, strict=True))
    options = {"zero_variance": zero_variance, "variance": variance}
    alone = estimators.bind("g2rpo", **options)(as_reward_batch(accuracy, groups, tasks), History()).numpy()
    parts, weights = {"accuracy": accuracy, "format": form}, {"accuracy": 1.0, "format": 0.0}
    np.testing.assert_array_equal(advantages("g2_gdpo", parts, groups, tasks, part_weights=weights, **options), alone)


@FIXED
@given(ROWS)
def test_dropped_groups_leave_the_others_as_if_they_were_absent(rows) -> None:
    """Bit for bit, for both estimators with the option."""
    accuracy, form, _, groups, tasks = map(np.array, zip(*rows, strict=True))
    spread = np.array([np.ptp(accuracy[groups == g]) > 0 or np.ptp(form[groups == g]) > 0 for g in groups])
    for name, parts in (("g2_gdpo", {"accuracy": accuracy, "format": form}), ("g2rpo", None)):
        estimator = estimators.get(name)
        kept = spread if parts else np.array([np.ptp(accuracy[groups == g]) > 0 for g in groups])
        all_rows = as_reward_batch(accuracy, groups, tasks, parts)
        others = parts and {key: part[kept] for key, part in parts.items()}
        kept_rows = as_reward_batch(accuracy[kept], groups[kept], tasks[kept], others)
        actual = estimator(all_rows, History()).numpy()
        np.testing.assert_array_equal(actual[kept], estimator(kept_rows, History()).numpy())
        np.testing.assert_array_equal(actual[~kept], 0.0)


def test_a_group_with_one_component_that_varies_is_not_dropped() -> None:
    """It ranks by that component; a group in which nothing varies takes no rank. A component of weight 0 that varies
    does not save its group."""
    parts = {"accuracy": [1, 1, 0, 0, 0, 1], "format": [0, 1, 1, 1, 0, 0]}
    groups = [0, 0, 1, 1, 2, 2]
    actual = advantages("g2_gdpo", parts, groups)
    np.testing.assert_allclose(actual, [-0.7345, 0.7345, 0, 0, -0.7345, 0.7345], atol=5e-5)
    actual = advantages("g2_gdpo", parts, groups, part_weights={"accuracy": 0.0, "format": 1.0})
    np.testing.assert_allclose(actual, [-0.6745, 0.6745, 0, 0, 0, 0], atol=5e-5)


@pytest.mark.parametrize("name", ["gdpo", "g2_gdpo"])
def test_weights_must_name_the_parts_and_parts_must_be_there(name: str) -> None:
    parts: Parts = {"accuracy": [0, 1], "format": [0, 1]}
    for weights, named in (({"accuracy": 1.0}, "accuracy"), ({**WEIGHTS}, "accuracy, format, length"), ({}, "none")):
        with pytest.raises(ValueError, match=rf"it names {named}, the parts are accuracy, format$"):
            advantages(name, parts, part_weights=weights)
    with pytest.raises(ValueError, match="'format' has the weight nan; weights must be finite"):
        advantages(name, parts, part_weights={"accuracy": 1.0, "format": math.nan})
    zeros = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="needs the parts of the rewards"):
        estimators.get(name)(as_reward_batch(zeros.astype(np.float64), zeros, zeros), History())
    assert advantages(name, parts, part_weights={"accuracy": 0.0, "format": 0.0}).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["gdpo", "g2_gdpo"])
def test_a_weight_may_differ_from_task_to_task(name: str) -> None:
    """A task alone, with its weights, gets what it gets beside another; gdpo: up to the scale of the whole batch."""
    rng = np.random.default_rng(3)
    parts = {"accuracy": rng.normal(size=32), "format": rng.integers(0, 2, 32).astype(np.float64)}
    groups, tasks = np.repeat(np.arange(4), 8), np.repeat([0, 1], 16)
    of_task = {0: {"accuracy": 0.9, "format": 0.0}, 1: {"accuracy": 0.0, "format": 2.0}}
    weights = {key: torch.tensor([of_task[task][key] for task in tasks], dtype=torch.float64) for key in parts}
    batch = as_reward_batch(np.zeros(32), groups, tasks, parts, weights)  # type: ignore[arg-type]
    together = estimators.get(name)(batch, History()).numpy()
    for task, alone_weights in of_task.items():
        mine = tasks == task
        alone = advantages(
            name,
            {key: part[mine] for key, part in parts.items()},
            groups[mine],
            tasks[mine],
            part_weights=alone_weights,
        )
        assert np.ptp(alone) > 0
        scale = 1.0 if name == "g2_gdpo" else together[mine].std() / alone.std()
        shift = 0.0 if name == "g2_gdpo" else together[mine].mean() - scale * alone.mean()
        np.testing.assert_allclose(together[mine], scale * alone + shift, rtol=0, atol=1e-12)
