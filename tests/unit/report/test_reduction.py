# SPDX-License-Identifier: Apache-2.0
"""Claim: what is made of metrics and records for the page is what the plain formula says, and groups are cut evenly."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from megatron_g2rpo.report.charts import Measured, charts_of
from megatron_g2rpo.report.charts.base import slug, smoothed
from megatron_g2rpo.report.charts.learning import contributions
from megatron_g2rpo.report.metrics import MOST_POINTS, Series, metrics_of
from megatron_g2rpo.report.recipes import differences
from megatron_g2rpo.report.rollouts import Overview, read_overview, read_rows
from megatron_g2rpo.report.run_directory import read_run
from megatron_g2rpo.report.selection import balanced, spread, within
from megatron_g2rpo.report.statistics import (
    PROBABILITIES,
    advantage_quantiles,
    changes_since_last_time,
    length_band,
    reward_band,
)
from tests.common.recorded_run import TASKS, WEIGHTS, write_recorded_run


def overview_of(**columns: list) -> Overview:
    """An overview of a few rollouts; columns that are not given are alike."""
    rows = len(columns["step"])
    plain = {name: np.zeros(rows, dtype=int) for name in ("file", "group_id", "sample_index", "tokens", "characters")}
    held = {
        **plain,
        "row": np.arange(rows),
        "task": np.array(["a"] * rows, dtype=object),
        "prompt_key": np.array(["k"] * rows, dtype=object),
        "reward": np.zeros(rows),
        "advantage": np.zeros(rows),
        "truncated": np.zeros(rows, dtype=bool),
        **{name: np.array(values) for name, values in columns.items()},
    }
    return Overview(files=[], parts={}, **held)


def test_the_overview_is_what_was_recorded(tmp_path: Path) -> None:
    overview = read_overview(write_recorded_run(tmp_path / "run", steps=5))
    assert overview is not None
    assert len(overview) == 5 * len(TASKS) * 2 * 4
    assert len(overview.groups()) == 5 * len(TASKS) * 2
    rows = np.array([3, 50, 100])
    for row, record in read_rows(overview, rows):
        assert record["step"] == overview.step[row]
        assert record["task"] == overview.task[row]
        assert record["reward"] == overview.reward[row]
        assert len(record["response_ids"]) == overview.tokens[row]
        assert record["reward_format"] == overview.parts["format"][row]
    assert read_overview(tmp_path) is None


def test_the_confidence_band_is_that_of_the_means_of_groups() -> None:
    overview = overview_of(step=[1] * 6 + [2] * 2, group_id=[0, 0, 1, 1, 2, 2, 0, 0], reward=[1, 0, 1, 1, 0, 0, 1, 1])
    band = reward_band(overview, "a")
    assert band is not None
    assert band.steps.tolist() == [1]  # one group says nothing of the spread between groups
    means = np.array([0.5, 1.0, 0.0])
    error = NormalDist().inv_cdf(0.975) * means.std(ddof=1) / math.sqrt(3)
    np.testing.assert_allclose([band.low[0], band.middle[0], band.high[0]], [0.5 - error, 0.5, 0.5 + error], rtol=1e-12)
    assert reward_band(overview, "b") is None


def test_the_band_of_groups_is_wider_than_that_of_independent_answers() -> None:
    """The mistake that would be silent: answers to one prompt taken for independent ones."""
    reward = np.repeat([0.0, 1.0, 0.0, 1.0], 8)
    overview = overview_of(step=[1] * 32, group_id=np.repeat([0, 1, 2, 3], 8).tolist(), reward=reward.tolist())
    band = reward_band(overview, None)
    assert band is not None
    independent = NormalDist().inv_cdf(0.975) * reward.std(ddof=1) / math.sqrt(32)
    assert band.high[0] - band.middle[0] > 2 * independent


def test_a_rollout_without_reward_is_left_out() -> None:
    overview = overview_of(step=[1] * 4, group_id=[0, 0, 1, 1], reward=[1.0, math.nan, 0.0, 0.0])
    band = reward_band(overview, "a")
    assert band is not None
    assert band.middle[0] == 0.5


def test_lengths_have_their_percentiles() -> None:
    overview = overview_of(step=[2] * 11 + [1], tokens=[*range(0, 110, 10), 7])
    band = length_band(overview, "a")
    assert band is not None
    assert band.steps.tolist() == [1, 2]
    assert (band.low[1], band.middle[1], band.high[1]) == (10, 50, 90)
    assert (band.low[0], band.high[0]) == (7, 7)


def test_gaussian_advantages_lie_on_the_diagonal_and_others_do_not() -> None:
    count = 4000
    normal = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    steps, groups = [1 + i % 9 for i in range(count)], [i // 9 for i in range(count)]
    found = advantage_quantiles(overview_of(step=steps, group_id=groups, advantage=normal), "a")
    assert [(each.first, each.last) for each in found] == [(1, 3), (4, 6), (7, 9)]
    # A third has three of nine neighbours, and at 1 % nine neighbours are 0.085 apart.
    for each in found:
        np.testing.assert_allclose(each.found, each.normal, atol=0.09)
    flat = advantage_quantiles(overview_of(step=steps, group_id=groups, advantage=[0.5 * x for x in normal]), "a")
    assert np.abs(flat[0].found - flat[0].normal).max() > 1.0
    assert len(found[0].normal) == len(PROBABILITIES)


def test_groups_without_signal_are_no_advantages() -> None:
    overview = overview_of(step=[1, 1, 1, 1], group_id=[0, 0, 1, 1], advantage=[-1.0, 1.0, 0.0, 0.0])
    assert [each.count for each in advantage_quantiles(overview, "a", parts=1)] == [2]
    assert advantage_quantiles(overview_of(step=[1, 1], advantage=[0.0, 0.0]), "a") == []


def test_a_change_is_measured_from_the_prompt_s_last_answers() -> None:
    overview = overview_of(
        step=[1, 1, 2, 2, 3], group_id=[0, 0, 0, 1, 0], prompt_key=["k", "k", "k", "other", "k"],
        reward=[1.0, 0.0, 0.2, 0.9, 1.0],
    )  # fmt: skip
    found = changes_since_last_time(overview)
    assert np.isnan(found[[0, 1, 3]]).all()
    np.testing.assert_allclose(found[[2, 4]], [0.2 - 0.5, 1.0 - 0.2])


def test_every_beginning_of_an_order_is_spread_evenly() -> None:
    for count in (1, 2, 3, 7, 8, 100):
        assert sorted(spread(count)) == list(range(count))
    assert spread(100)[:2] == [0, 99]
    eight = sorted(spread(100)[:9])
    assert max(b - a for a, b in pairwise(eight)) <= 20


def test_tasks_take_turns_however_many_groups_they_have() -> None:
    overview = overview_of(step=list(range(10)), group_id=list(range(10)), task=["many"] * 8 + ["few"] * 2)
    order = balanced(overview, overview.groups())
    assert [overview.task[index] for index in order[:4]] == ["few", "many", "few", "many"]
    assert sorted(order) == list(range(10))


def test_a_budget_is_kept_but_for_the_first_group() -> None:
    sizes = np.array([5.0, 5.0, 5.0])
    assert within([2, 0, 1], sizes, 10.0) == [2, 0]
    assert within([2, 0, 1], sizes, 1.0) == [2]
    assert within([], sizes, 10.0) == []


def test_a_long_run_s_curve_is_averaged_and_keeps_its_mean() -> None:
    steps = 5 * MOST_POINTS
    lines = [
        {"step": step, "train/x": float(step % 7), **({"val/y": 1.0} if step % 500 == 0 else {})}
        for step in range(steps)
    ]
    metrics = metrics_of(lines)
    assert metrics.bin_size == 5
    assert len(metrics["train/x"].steps) == MOST_POINTS
    values = [value for value in metrics["train/x"].values if value is not None]
    assert np.mean(values) == pytest.approx(np.mean([step % 7 for step in range(steps)]))
    assert list(metrics["val/y"].steps) == list(range(0, steps, 500))


def test_a_moving_average_leaves_a_straight_line_where_it_is_whole() -> None:
    series = Series(steps=list(range(20)), values=[float(2 * x) for x in range(20)])
    assert smoothed(series, 3).values[3:-3] == pytest.approx(series.values[3:-3])
    gap = Series(steps=series.steps, values=[None if x == 10 else 1.0 for x in range(20)])
    assert smoothed(gap, 2).values == pytest.approx([1.0] * 20)


def test_the_parts_add_up_to_the_reward(tmp_path: Path) -> None:
    run = read_run(write_recorded_run(tmp_path / "run", steps=6))
    for task in TASKS:
        found = contributions(Measured(run=run, overview=None), task)
        assert list(found) == [part for part, weight in WEIGHTS.items() if weight]
        total = np.sum([series.values for series in found.values()], axis=0)
        np.testing.assert_allclose(total, run.metrics[f"train/{task}/reward"].values, atol=1e-12)


def test_what_the_parts_do_not_explain_is_other(tmp_path: Path) -> None:
    run = read_run(write_recorded_run(tmp_path / "run", steps=3))
    run.recipe["env"]["reward_weights"] = {"format": 0.2}
    found = contributions(Measured(run=run, overview=None), "ocr")
    assert list(found) == ["format", "other"]
    accuracy = np.array(run.metrics["train/ocr/accuracy"].values, dtype=float)
    np.testing.assert_allclose(found["other"].values, 0.8 * accuracy, atol=1e-12)


def test_every_chart_has_its_own_name_a_sentence_and_data(tmp_path: Path) -> None:
    path = write_recorded_run(tmp_path / "run", steps=20)
    sections = charts_of([Measured(run=read_run(path), overview=read_overview(path))])
    charts = [chart for _, section in sections for chart in section]
    assert len({chart.name for chart in charts}) == len(charts)
    assert all(chart.about.endswith(".") and len(chart.about) > 40 for chart in charts)
    assert [chart.name for chart in charts if not chart.has_data] == []


def test_names_of_tasks_that_differ_in_odd_characters_differ() -> None:
    assert slug("reward", "ocr") == "reward-ocr"
    assert len({slug("reward", task) for task in ("a/b", "a.b", "a-b", "a b", "ä-b")}) == 5
    assert all(part.isascii() for part in slug("reward", "ä/b"))


def test_recipes_differ_in_what_differs() -> None:
    assert differences({"a": {"b": 1, "c": [1]}, "d": "x"}, {"a": {"b": 2, "c": [1]}, "e": None}) == [
        ("a.b", "1", "2"), ("d", "x", "-"), ("e", "-", "null"),
    ]  # fmt: skip
