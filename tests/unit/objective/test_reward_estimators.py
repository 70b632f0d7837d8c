# SPDX-License-Identifier: Apache-2.0
"""Values of the estimators that read one reward a rollout, by hand and against the formulas of their papers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from megatron_g2rpo.objective import estimators, gaussian_advantages
from megatron_g2rpo.objective.history import History, Moments
from megatron_g2rpo.objective.reward_batch import as_reward_batch


def advantages(
    name: str,
    rewards: object,
    groups: object = None,
    tasks: object = None,
    history: History | None = None,
    **options: object,
) -> np.ndarray:
    """Of one group and one task where none are given."""
    values = np.asarray(rewards, dtype=np.float64)
    zeros = np.zeros(len(values), dtype=np.int64)
    ids = [zeros if column is None else np.asarray(column, dtype=np.int64) for column in (groups, tasks)]
    return estimators.bind(name, **options)(as_reward_batch(values, *ids), history or History()).numpy()


@pytest.mark.parametrize(
    ("name", "rewards", "expected"),
    [
        ("grpo", [0, 0, 0, 0, 1], [-0.5] * 4 + [2.0]),
        ("grpo", [0, 0, 1, 1, 1], [-1.2247] * 2 + [0.8165] * 3),
        ("dr_grpo", [0.81, 0.81, 0.82, 0.82, 0.83], [-0.008] * 2 + [0.002] * 2 + [0.012]),
    ],
)
def test_reproduces_the_baselines_of_the_papers_table(name: str, rewards: list[float], expected: list[float]) -> None:
    """arXiv 2604.08539, method figure, to 4 digits, hence half a unit of the fourth. The column of G2RPO is in
    test_advantages.py, the row of EMA-GRPO below."""
    np.testing.assert_allclose(advantages(name, rewards), expected, atol=5e-5, rtol=0)


def test_the_ema_row_of_the_papers_table_is_known_up_to_its_scale() -> None:
    """That row divides R - mean by a moving average over earlier steps, which the figure does not tell: the values
    themselves can't be reproduced. Their proportions can, whatever was before; and so can the first step, whose
    average is the batch's own, and hence GRPO for a task of one group. 1e-12: rewards of one digit are rounded."""
    rewards, proportions = [0.1, 0.1, 0.1, 0.2, 1], np.array([-2, -2, -2, -1, 7])
    np.testing.assert_allclose(advantages("ema_grpo", rewards), advantages("grpo", rewards), atol=1e-12, rtol=0)
    for earlier in (Moments(0.5, 0.02), Moments(0.0, 3.0)):
        history = History()
        history.moments[0] = earlier
        actual = advantages("ema_grpo", rewards, history=history)
        np.testing.assert_allclose(actual, actual[4] / 7 * proportions, atol=1e-12, rtol=0)
        assert actual[4] == pytest.approx(0.7 / history.moments[0].std, abs=1e-12)


def test_g2rpo_is_the_gaussian_advantage_of_the_rewards() -> None:
    rng = np.random.default_rng(0)
    rewards, groups, tasks = rng.integers(0, 3, 40) / 2, np.repeat(np.arange(5), 8), np.repeat([0, 0, 1, 1, 1], 8)
    for options in ({}, {"zero_variance": "keep", "variance": "unit"}, {"stages": ("task",), "tie_tolerance": 0.6}):
        expected = gaussian_advantages(rewards, groups, tasks, **options)
        np.testing.assert_array_equal(advantages("g2rpo", rewards, groups, tasks, **options), expected)


def test_grpo_standardises_each_group_and_gives_equal_rewards_exactly_zero() -> None:
    rewards = np.array([0.1, 3.0, 0.1, 1.0, 0.1, 2.0, 0.1 + 1e-8])
    groups = np.array([9, -4, 9, -4, 9, -4, 9])
    actual = advantages("grpo", rewards, groups, groups)
    assert actual[groups == 9].tolist() == [0.0] * 4
    # 1e-15: one subtraction and one division of numbers of order 1.
    assert actual[groups == -4].tolist() == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0], abs=1e-15)


def test_dr_grpo_subtracts_the_mean_of_the_group() -> None:
    assert advantages("dr_grpo", [1, 5, 2, 6, 5], groups=[3, 8, 3, 3, 8]).tolist() == [-2, 0, -1, 3, 0]


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    """Five rewards: a 0 is compared with (1 + 1 + 1 + 0) / 4, a 1 with 2 / 4. Alone, there is nothing to compare with.
    1e-15: rounding of n / (n - 1)."""
    actual = advantages("rloo", [0, 0, 1, 1, 1, 7], groups=[0, 0, 0, 0, 0, 1])
    assert actual.tolist() == pytest.approx([-0.75, -0.75, 0.5, 0.5, 0.5, 0], abs=1e-15)
    rewards = np.random.default_rng(1).normal(size=7)
    expected = [rewards[i] - np.delete(rewards, i).mean() for i in range(7)]
    np.testing.assert_allclose(advantages("rloo", rewards), expected, atol=1e-14, rtol=0)


def test_reinforce_plus_plus_divides_by_the_standard_deviation_of_the_batch() -> None:
    """Rewards 0 1 | 0 3, whose mean is 1 and variance 3/2; less their group's mean -1/2 1/2 | -3/2 3/2, variance 5/4.
    Tasks play no part. 1e-15: two roundings."""
    batch = {"rewards": [0, 1, 0, 3], "groups": [0, 0, 1, 1], "tasks": [0, 0, 1, 1]}
    expected = np.array([-1, 0, -1, 2]) / math.sqrt(1.5)
    np.testing.assert_allclose(advantages("reinforce_plus_plus", **batch, baseline="batch"), expected, atol=1e-15)
    expected = np.array([-0.5, 0.5, -1.5, 1.5]) / math.sqrt(1.25)
    np.testing.assert_allclose(advantages("reinforce_plus_plus", **batch, baseline="group"), expected, atol=1e-15)
    np.testing.assert_allclose(advantages("reinforce_plus_plus", **batch), expected, atol=1e-15)


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_reinforce_plus_plus_of_a_batch_without_spread_is_zero(baseline: str) -> None:
    """Also where the rewards differ by rounding only, which a division would blow up."""
    rewards = [0.1, 0.1, 0.1 + 1e-9, 0.1]
    assert advantages("reinforce_plus_plus", rewards, baseline=baseline).tolist() == [0.0] * 4


def test_ema_grpo_moves_its_averages_and_then_divides() -> None:
    """Task 5 by hand. First m1 = m2 = 1/4, of which sigma^2 = 3/16; then the batch's are 3/4, and with decay 1/2
    m1 = m2 = 1/2, sigma = 1/2. Task 6, absent from the second step, keeps its average; a task without spread is divided
    by min_std."""
    history = History()
    first = advantages("ema_grpo", [0, 1, 0, 0, 2, 6], [0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 6, 6], history, ema_decay=0.5)
    half = 0.5 / math.sqrt(3 / 16)
    np.testing.assert_allclose(first, [-half, half, 0, 0, -1, 1], atol=1e-15)
    second = advantages("ema_grpo", [1, 1, 1, 0, 4, 4], [3, 3, 4, 4, 5, 5], [5, 5, 5, 5, 7, 7], history, ema_decay=0.5)
    np.testing.assert_allclose(second, [0, 0, 1, -1, 0, 0], atol=1e-15)
    assert history.moments[5] == Moments(0.5, pytest.approx(0.5, abs=1e-15))
    assert history.moments[6] == Moments(4.0, 2.0)
    assert history.moments[7] == Moments(4.0, 0.0)
    tiny = advantages("ema_grpo", [4.0, 4.0 + 1e-9], tasks=[7, 7], history=history, min_std=1e-2)
    np.testing.assert_allclose(tiny, [-5e-8, 5e-8], atol=1e-13)  # of 4, a rounding is 1e-15 / min_std


def test_ema_grpo_is_its_recurrence_over_steps_and_a_resumed_run_is_the_same() -> None:
    """The paper's m1 and m2 as they are written, 30 steps. 1e-12: m2 - m1^2 cancels about one digit."""
    rng = np.random.default_rng(2)
    history, decay, m1, m2 = History(), 0.9, {}, {}
    for step in range(30):
        tasks = np.repeat(rng.choice([1, 2, 3], 6), 4)
        groups = np.repeat(np.arange(6), 4)
        rewards = rng.normal(size=24) * tasks + step / 10
        expected = rewards - rewards.reshape(6, 4).mean(1).repeat(4)
        for task in np.unique(tasks):
            own = rewards[tasks == task]
            m1[task] = decay * m1[task] + (1 - decay) * own.mean() if task in m1 else own.mean()
            m2[task] = decay * m2[task] + (1 - decay) * (own**2).mean() if task in m2 else (own**2).mean()
            expected[tasks == task] /= math.sqrt(m2[task] - m1[task] ** 2)
        resumed = History()
        resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
        actual = advantages("ema_grpo", rewards, groups, tasks, history, ema_decay=decay)
        np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=1e-12)
        again = advantages("ema_grpo", rewards, groups, tasks, resumed, ema_decay=decay)
        np.testing.assert_array_equal(again, actual)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ema_grpo", {"ema_decay": 1.0}, "ema_decay"),
        ("ema_grpo", {"min_std": 0.0}, "min_std"),
        ("reinforce_plus_plus", {"baseline": "task"}, "baseline must be 'batch' or 'group', got 'task'"),
        ("grpo", {"tie_tolerance": -1.0}, "tie_tolerance"),
    ],
)
def test_options_out_of_their_range_are_errors(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(name, [0.0, 1.0], **options)


@pytest.mark.parametrize("name", sorted(set(estimators.names()) - {"gdpo", "g2_gdpo"}))
def test_a_reward_that_is_not_finite_is_an_error_that_leaves_no_trace(name: str) -> None:
    history = History()
    with pytest.raises(ValueError, match="row 1 is nan"):
        advantages(name, torch.tensor([0.0, math.nan]), history=history)
    assert history.moments == {}
