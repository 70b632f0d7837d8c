# SPDX-License-Identifier: Apache-2.0
"""Claims: pass@k is the share of k-subsets with a success; intervals and p-values are scipy's and brute force's."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from megatron_g2rpo.commands.eval.statistics import estimates, paired, pass_at_k, pass_ks

RNG = np.random.default_rng(3)
# Monte-Carlo error of a quantile of 10,000 resamples, in standard deviations of the mean: about 3 x 0.027.
QUANTILE_TOLERANCE = 0.08


@pytest.mark.parametrize(("n", "successes"), [(1, 0), (1, 1), (5, 2), (6, 1), (6, 6), (7, 0)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n: int, successes: int) -> None:
    samples = [1] * successes + [0] * (n - successes)
    for k in range(1, n + 1):
        subsets = [any(subset) for subset in combinations(samples, k)]
        assert pass_at_k(n, successes, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    # A product of floats is off in the tenth digit here: 1 - C(1000, 500) / C(2000, 500) is next to 1.
    assert pass_at_k(2000, 1, 1000) == 0.5
    with pytest.raises(ValueError, match="pass@3 of 0 successes in 2 samples"):
        pass_at_k(2, 0, 3)


def test_ks_are_powers_of_two_and_the_number_of_samples() -> None:
    assert [pass_ks(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def test_an_interval_is_the_quantiles_of_means_of_resampled_prompts() -> None:
    """Against a bootstrap written out, with draws of its own."""
    rows = RNG.random((40, 3))
    found = estimates({"a": rows}).by_task["a"]
    drawn = np.stack([rows[RNG.integers(40, size=40)].mean(axis=0) for _ in range(10_000)])
    for column, estimate in enumerate(found):
        assert estimate.mean == pytest.approx(rows[:, column].mean(), abs=1e-15)
        expected = np.quantile(drawn[:, column], [0.025, 0.975])
        allowed = QUANTILE_TOLERANCE * drawn[:, column].std()
        assert [estimate.low, estimate.high] == pytest.approx(expected, abs=allowed)


def test_tasks_weigh_alike_in_the_mean_over_tasks_and_by_size_in_that_over_samples() -> None:
    values = {"few": RNG.random((10, 1)), "many": RNG.random((90, 1)) + 1.0}
    found = estimates(values)
    means = {task: rows.mean() for task, rows in values.items()}
    assert found.over_tasks[0].mean == pytest.approx((means["few"] + means["many"]) / 2)
    assert found.over_samples[0].mean == pytest.approx(np.concatenate(list(values.values())).mean())
    # The mean of two independent means: its variance is the sum of theirs, over four.
    spread = np.sqrt(sum(rows.var() / len(rows) for rows in values.values())) / 2
    low, high = found.over_tasks[0].low, found.over_tasks[0].high
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    # Resampling the tasks' sizes too would add the distance between the tasks.
    assert found.over_samples[0].high - found.over_samples[0].low < 0.15  # type: ignore[operator]


def test_another_task_does_not_change_a_tasks_interval() -> None:
    rows = RNG.random((20, 2))
    assert estimates({"b": rows}).by_task["b"] == estimates({"a": rows[:7], "b": rows}).by_task["b"]


def test_one_prompt_has_no_interval_and_neither_has_the_mean_over_it() -> None:
    found = estimates({"one": np.array([[0.5]]), "two": np.array([[0.0], [1.0]])})
    assert (found.by_task["one"][0].low, found.over_tasks[0].low, found.over_samples[0].high) == (None, None, None)
    assert found.by_task["two"][0].low == 0.0
    assert found.over_tasks[0].mean == 0.5


def test_the_p_value_of_few_prompts_is_that_of_all_signs() -> None:
    earlier, later = RNG.random(9), RNG.random(9) + 0.2
    difference = later - earlier
    sums = np.array([np.dot(signs, difference) for signs in product((1, -1), repeat=9)])
    expected = (np.abs(sums) >= abs(difference.sum()) * (1 - 1e-12)).mean()
    found = paired({"a": earlier}, {"a": later})
    assert found.by_task["a"].p_value == pytest.approx(expected, abs=1e-12)
    assert found.over_tasks.p_value == found.over_samples.p_value == pytest.approx(expected, abs=1e-12)


def test_the_p_value_of_many_prompts_is_near_that_of_the_t_test() -> None:
    earlier = RNG.random(400)
    noise = RNG.normal(0.0, 0.2, 400)
    later = earlier + noise - noise.mean() + 0.018  # 1.8 standard errors
    found = paired({"a": earlier}, {"a": later}).by_task["a"]
    expected = stats.ttest_rel(later, earlier).pvalue
    assert 0.01 < expected < 0.5, "a p-value on either end would prove little"
    # Four standard errors of a share of 9,999 permutations.
    assert found.p_value == pytest.approx(expected, abs=4 * np.sqrt(expected / 9_999) + 0.005)
    assert found.difference.mean == pytest.approx((later - earlier).mean())
    assert (found.earlier, found.later, found.n) == (earlier.mean(), later.mean(), 400)


def test_equal_evaluations_do_not_differ() -> None:
    values = {"a": RNG.random(5), "b": RNG.random(3)}
    found = paired(values, values)
    assert {each.p_value for each in (*found.by_task.values(), found.over_tasks)} == {1.0}
    assert found.over_samples.difference.mean == found.over_samples.difference.high == 0.0
    assert found.over_tasks.earlier == pytest.approx((values["a"].mean() + values["b"].mean()) / 2)
    assert found.over_samples.n == 8
