# SPDX-License-Identifier: Apache-2.0
"""Gaussian advantages: golden values, ties, zero variance, unit variance, order of rows, extremes, errors.

Every test with the ``implementation`` fixture holds for the compiled op and for the torch one.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import rankdata

from megatron_g2rpo.objective import advantages as module
from megatron_g2rpo.objective import backend, gaussian_advantages

LIMITS = np.iinfo(np.int64)


def one_group(rewards: list[float], **options: object) -> np.ndarray:
    zeros = np.zeros(len(rewards), dtype=np.int64)
    return gaussian_advantages(
        np.array(rewards, dtype=np.float64), zeros, zeros, **{"stages": ["group"], **options}
    ).numpy()


def random_batch(seed: int, groups: int = 24, size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards on coarse grids, so that ties and all-equal groups abound; ids are scattered over int64."""
    rng = np.random.default_rng(seed)
    group_ids = rng.choice([LIMITS.min, LIMITS.max, *rng.integers(LIMITS.min, LIMITS.max, groups)], groups, False)
    grid = rng.integers(1, 6, groups)
    rewards = np.concatenate([rng.integers(0, g, size) / max(g - 1, 1) for g in grid])
    tasks = np.array([-5, 0, LIMITS.max])[rng.integers(0, 3, groups)]
    order = rng.permutation(groups * size)
    return rewards[order], np.repeat(group_ids, size)[order], np.repeat(tasks, size)[order]


def two_stages(rewards: np.ndarray, groups: np.ndarray, tasks: np.ndarray, drop: bool) -> np.ndarray:
    """Independent statement of the algorithm, from ranks; values are rounded so that equal ones are bit-equal."""
    values, active = np.round(rewards, 9), np.ones(len(rewards), dtype=bool)
    for ids in (groups, tasks):
        images = np.zeros(len(values))
        for set_id in np.unique(ids):
            members = np.flatnonzero((ids == set_id) & active)
            n = len(members)
            if n == 0:
                continue
            low, high = rankdata(values[members], "min"), rankdata(values[members], "max")
            quantiles = ndtri((np.arange(1, n + 1) - 0.5) / n)
            images[members] = [quantiles[a - 1 : b].mean() for a, b in zip(low, high, strict=True)]
            if drop and high[0] - low[0] + 1 == n:
                active[members] = False
        values = np.where(active, np.round(images, 9), 0.0)
    return np.where(active, images, 0.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.3204] * 4 + [1.2816]),
        ([0, 0, 1, 1, 1], [-0.9030] * 2 + [0.6020] * 3),
        ([0.1, 0.1, 0.1, 0.2, 1], [-0.6020] * 3 + [0.5244, 1.2816]),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.9030] * 2 + [0.2622] * 2 + [1.2816]),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reproduces_the_papers_table(implementation: str, rewards: list[float], expected: list[float], dtype) -> None:
    """arXiv 2604.08539, method figure; printed to 4 digits, hence half a unit of the fourth."""
    zeros = np.zeros(5, dtype=np.int64)
    actual = gaussian_advantages(np.array(rewards, dtype=dtype), zeros, zeros, stages=["group"])
    np.testing.assert_allclose(actual, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 8, 31, 64, 4097, 100_000])
def test_distinct_values_get_scipys_normal_quantiles(implementation: str, n: int) -> None:
    """Within 1e-12. Only the lower half is compared with scipy: near p = 1 the rounding of p itself is worth more than
    that (5e-17 over the density, 1e-12 at n = 100,000). The upper half must be its exact mirror image."""
    rewards = np.random.default_rng(n).permutation(n).astype(np.float64)
    actual = np.sort(one_group(list(rewards)))
    half = n // 2
    np.testing.assert_allclose(actual[:half], ndtri((np.arange(half) + 0.5) / n), atol=1e-12, rtol=0)
    np.testing.assert_array_equal(actual, -actual[::-1])


@pytest.mark.skipif(backend() != "cpp", reason="the compiled op is not built here")
def test_the_quantile_function_is_scipys_over_all_doubles() -> None:
    """1e-12 absolute: both claim a relative error of 1e-15 or less, of values below 40. Reaches all three branches."""
    from megatron_g2rpo.objective import _group_ops

    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(0, 1, 20_000), 10 ** -rng.uniform(0, 307, 20_000), [0.075, 0.5, 0.925, 1 - 2**-53]])
    np.testing.assert_allclose(_group_ops.normal_quantile(p), ndtri(p), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("zero_variance", ["drop", "keep"])
def test_two_stages_equal_an_independent_statement_from_ranks(
    implementation: str, seed: int, zero_variance: str
) -> None:
    """1e-8, because the statement rounds to 9 digits between the stages (which moves no rank here)."""
    batch = random_batch(seed)
    expected = two_stages(*batch, drop=zero_variance == "drop")
    np.testing.assert_allclose(gaussian_advantages(*batch, zero_variance=zero_variance), expected, atol=1e-8, rtol=0)


def test_all_equal_group_is_dropped_or_kept(implementation: str) -> None:
    """Kept, it re-enters the task stage at 0 and earns +0.80 for having no signal; dropped, the rest rank alone."""
    rewards = np.array(([0.0] * 7 + [1.0]) * 3 + [0.5] * 8)
    groups, tasks = np.repeat(np.arange(4), 8), np.zeros(32, dtype=np.int64)
    kept = gaussian_advantages(rewards, groups, tasks, zero_variance="keep").numpy()
    np.testing.assert_allclose(kept[24:], 0.80, atol=5e-3)
    dropped = gaussian_advantages(rewards, groups, tasks, zero_variance="drop").numpy()
    np.testing.assert_array_equal(dropped[24:], 0.0)
    alone = gaussian_advantages(rewards[:24], groups[:24], tasks[:24]).numpy()
    np.testing.assert_array_equal(dropped[:24], alone)


def test_neighbours_within_the_tolerance_tie_in_chains(implementation: str) -> None:
    """0 ~ 0.6 ~ 1.2 tie through the middle at tolerance 1, although 0 and 1.2 are further apart than it."""
    chained = one_group([1.2, 0.0, 0.6, 9.0], tie_tolerance=1.0)
    np.testing.assert_array_equal(chained, one_group([0, 0, 0, 1]))
    split = one_group([1.2, 0.0, 0.6, 9.0], tie_tolerance=0.5)
    assert len(np.unique(split)) == 4
    assert one_group([3.0, 3.0], tie_tolerance=0.0).tolist() == [0.0, 0.0]  # equal values tie at any tolerance


def test_the_tolerance_also_joins_values_of_the_task_stage(implementation: str) -> None:
    """Rewards apart by rounding only leave the task stage as if they were equal."""
    rewards = np.array([0.1, 0.1, 0.3, 0.1 + 1e-9, 0.1, 0.3 - 1e-9])
    groups, tasks = np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, dtype=np.int64)
    actual = gaussian_advantages(rewards, groups, tasks).numpy()
    np.testing.assert_array_equal(actual[:3], actual[3:])


@pytest.mark.parametrize("zero_variance", ["drop", "keep"])
def test_one_rollout_and_none_have_no_advantage(implementation: str, zero_variance: str) -> None:
    assert one_group([7.5], stages=["group", "task"], zero_variance=zero_variance).tolist() == [0.0]
    assert one_group([], stages=["group", "task"], zero_variance=zero_variance).shape == (0,)


@pytest.mark.parametrize("zero_variance", ["drop", "keep"])
def test_unit_variance_rescales_every_task_to_exactly_one(implementation: str, zero_variance: str) -> None:
    """Population standard deviation 1 within 1e-12 over the rows that are ranked; signs and order as they were."""
    batch = random_batch(3)
    plain = gaussian_advantages(*batch, zero_variance=zero_variance).numpy()
    unit = gaussian_advantages(*batch, zero_variance=zero_variance, variance="unit").numpy()
    rewards, groups, tasks = batch
    spread = {g: np.ptp(rewards[groups == g]) > 0 for g in np.unique(groups)}
    ranked = np.array([zero_variance == "keep" or spread[g] for g in groups])
    for task in np.unique(tasks):
        members = (tasks == task) & ranked
        assert unit[members].std() == pytest.approx(1.0, abs=1e-12)
        np.testing.assert_allclose(unit[members], plain[members] / plain[members].std(), atol=1e-12, rtol=0)
    assert plain[ranked].std() < 0.99  # there was something to rescale
    np.testing.assert_array_equal(unit[~ranked], 0.0)


def test_unit_variance_of_a_task_without_signal_stays_zero(implementation: str) -> None:
    assert one_group([2.0] * 4, stages=["group", "task"], variance="unit").tolist() == [0.0] * 4


@pytest.mark.parametrize("variance", ["as_is", "unit"])
@pytest.mark.parametrize("zero_variance", ["drop", "keep"])
def test_order_of_rows_does_not_change_a_bit(implementation: str, zero_variance: str, variance: str) -> None:
    rewards, groups, tasks = random_batch(7)
    rewards = rewards * 0.1
    options: dict[str, Any] = {"zero_variance": zero_variance, "variance": variance}
    expected = gaussian_advantages(rewards, groups, tasks, **options).numpy()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rewards))
        actual = gaussian_advantages(rewards[order], groups[order], tasks[order], **options).numpy()
        np.testing.assert_array_equal(actual.view(np.int64), expected[order].view(np.int64))


def test_extreme_rewards_are_ranked_like_any_other(implementation: str) -> None:
    """Denormals and the largest doubles, whose difference overflows; no tolerance, or the denormals would tie."""
    ordered = [-1.7e308, -1.0, -5e-324, 0.0, 5e-324, 2.0, 1.7e308]
    np.testing.assert_array_equal(one_group(ordered, tie_tolerance=0.0), one_group([0, 1, 2, 3, 4, 5, 6]))


def test_reads_tensors_strided_views_and_read_only_arrays_without_writing(implementation: str) -> None:
    rewards, groups, tasks = random_batch(1)
    expected = gaussian_advantages(rewards, groups, tasks)
    strided = torch.from_numpy(np.repeat(rewards, 2))[::2]
    assert torch.equal(gaussian_advantages(strided, torch.from_numpy(groups), torch.from_numpy(tasks)), expected)
    assert torch.equal(gaussian_advantages(rewards[::-1], groups[::-1], tasks[::-1]).flip(0), expected)
    before = rewards.copy()
    rewards.flags.writeable = False
    assert torch.equal(gaussian_advantages(rewards, groups, tasks), expected)
    np.testing.assert_array_equal(rewards, before)
    assert expected.dtype == torch.float64


@pytest.mark.parametrize(("bad", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_a_reward_that_is_not_finite_is_named(implementation: str, bad: float, text: str) -> None:
    rewards, groups, tasks = np.array([0.0, 1.0, bad]), np.array([4, 4, 17]), np.array([0, 0, -2])
    with pytest.raises(ValueError, match=rf"row 2 is {text} \(group 17, task -2\)"):
        gaussian_advantages(rewards, groups, tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "stages"),
        ({"stages": "group"}, "stages"),
        ({"stages": ["group", "group"]}, "stages"),
        ({"stages": ["prompt"]}, "stages"),
        ({"tie_tolerance": -1e-6}, "tie_tolerance"),
        ({"tie_tolerance": float("nan")}, "tie_tolerance"),
        ({"zero_variance": "ignore"}, "zero_variance"),
        ({"variance": "one"}, "variance"),
    ],
)
def test_unknown_options_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_group([0.0, 1.0], **options)


def test_rows_of_other_types_and_lengths_are_errors() -> None:
    rewards, ids = np.zeros(3), np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match="lengths 3, 2 and 3"):
        gaussian_advantages(rewards, ids[:2], ids)
    with pytest.raises(ValueError, match=r"group_ids must be one-dimensional \[N\], got shape \(3, 1\)"):
        gaussian_advantages(rewards, ids[:, None], ids)
    with pytest.raises(TypeError, match=r"rewards has dtype torch\.int64; expected float32, float64"):
        gaussian_advantages(ids, ids, ids)
    with pytest.raises(TypeError, match=r"task_ids has dtype torch\.float64"):
        gaussian_advantages(rewards, ids, rewards)
    with pytest.raises(TypeError, match="rewards must be a tensor or a numpy array, got list"):
        gaussian_advantages(cast(Any, [0.0, 1.0, 2.0]), ids, ids)
    with pytest.raises(ValueError, match="rewards is on meta; move it to the CPU"):
        gaussian_advantages(torch.zeros(3, device="meta"), ids, ids)


@pytest.mark.skipif(backend() != "cpp", reason="the compiled op is not built here")
def test_the_compiled_op_itself_takes_nothing_that_it_would_misread() -> None:
    """What ``as_reward_batch`` refuses or converts before; a caller of the op alone must not get another answer."""
    from megatron_g2rpo.objective import _group_ops

    rewards, ids = np.zeros(4), np.zeros(4, dtype=np.int64)
    wrong_rewards: tuple[Any, ...] = (rewards.astype(np.float16), rewards.astype(np.int64), np.zeros(8)[::2])
    narrow_ids: Any = ids.astype(np.int32)
    options = (["group"], 1e-6, True, False)
    with pytest.raises(ValueError, match="of one length"):
        _group_ops.gaussian_advantages(rewards, ids[:3], ids, *options)
    with pytest.raises(ValueError, match="one-dimensional"):
        _group_ops.group_statistics(rewards.reshape(2, 2), ids, ids, 1e-6)
    with pytest.raises(ValueError, match="unknown stage 'prompt'; known: group, task"):
        _group_ops.gaussian_advantages(rewards, ids, ids, ["prompt"], *options[1:])
    for wrong in wrong_rewards:
        with pytest.raises(TypeError):
            _group_ops.gaussian_advantages(wrong, ids, ids, *options)
    with pytest.raises(TypeError):
        _group_ops.gaussian_advantages(rewards, narrow_ids, ids, *options)


def test_a_missing_extension_is_reported_once_and_replaced_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module._EXTENSION, None)
    with pytest.warns(UserWarning, match="_group_ops is not built"):
        monkeypatch.setattr(module, "_extension", module._load_extension())
    assert backend() == "torch"
