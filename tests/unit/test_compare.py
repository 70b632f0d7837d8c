# SPDX-License-Identifier: Apache-2.0
"""Claims: the tests' comparator keeps the worst error, refuses kinds without a tolerance, and asserts nothing idly."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.common.compare import (
    Report,
    largest_difference,
    largest_distance,
    largest_error,
    relative_distance,
    total_distance,
)

NAN = float("nan")
TOLERANCES = {"logprob": 1e-5, "gradient": 1e-3}


@pytest.fixture
def good() -> Report:
    report = Report(TOLERANCES)
    report.note("logprob", 1e-6, "sequence 0")
    report.note("gradient", 1e-4, "norm.weight")
    return report


def test_errors_up_to_the_tolerance_pass(good: Report) -> None:
    good.note("logprob", 1e-5)
    good.assert_within_tolerance()


@pytest.mark.parametrize("error", [1.1e-5, math.inf, NAN])
def test_one_error_beyond_the_tolerance_fails_and_is_named(good: Report, error: float) -> None:
    good.note("logprob", error, "sequence 3")
    good.note("logprob", 0.0, "sequence 4")
    assert good.worst["logprob"][1] == "sequence 3"
    with pytest.raises(AssertionError, match="1 errors too large:\nlogprob sequence 3"):
        good.assert_within_tolerance()
    good.assert_exceeded("logprob")


def test_a_larger_error_does_not_hide_one_that_is_no_number(good: Report) -> None:
    good.note("gradient", NAN, "first")
    good.note("gradient", 5.0, "second")
    assert good.worst["gradient"][1] == "first"


def test_a_kind_without_a_tolerance_is_refused(good: Report) -> None:
    with pytest.raises(
        KeyError, match="errors of kind 'entropy' have no tolerance; those that have: logprob, gradient"
    ):
        good.note("entropy", 0.0)
    assert "entropy" not in good.worst


def test_nothing_compared_does_not_pass() -> None:
    with pytest.raises(AssertionError, match="nothing was compared of: gradient, logprob"):
        Report(TOLERANCES).assert_within_tolerance()
    with pytest.raises(AssertionError, match="nothing was compared"):
        Report({}).assert_within_tolerance()


def test_a_kind_that_was_not_compared_does_not_pass() -> None:
    report = Report(TOLERANCES)
    report.note("logprob", 0.0)
    with pytest.raises(AssertionError, match="nothing was compared of: gradient"):
        report.assert_within_tolerance()


def test_an_excess_that_was_not_compared_or_not_named_does_not_pass(good: Report) -> None:
    with pytest.raises(AssertionError, match="no kind was named"):
        good.assert_exceeded()
    with pytest.raises(AssertionError, match="nothing was compared of: gradient"):
        Report(TOLERANCES).assert_exceeded("gradient")


def test_the_margin_multiplies_the_tolerance(good: Report) -> None:
    good.note("logprob", 9e-5)
    good.assert_exceeded("logprob", margin=8)
    with pytest.raises(AssertionError, match="logprob is within tolerance"):
        good.assert_exceeded("logprob", margin=10)
    with pytest.raises(AssertionError, match="gradient is within tolerance"):
        good.assert_exceeded("logprob", "gradient", margin=8)


def test_merging_keeps_the_worst_of_both_and_every_failure_once(good: Report) -> None:
    other = Report(TOLERANCES)
    other.note("logprob", 1e-7, "sequence 1")
    other.note("gradient", 1.0, "bias")
    for _ in range(2):
        good.merge(other)
    assert good.worst == {"logprob": (1e-6, "sequence 0"), "gradient": (1.0, "bias")}
    assert good.failures == ["gradient bias: 1.00e+00 > 1e-03"]


def test_what_another_process_found_fails_here(good: Report) -> None:
    good.note("gradient", NAN, "bias")
    again = Report(TOLERANCES, json.loads(json.dumps(good.worst)))
    assert str(again) == str(good)
    with pytest.raises(AssertionError, match="gradient bias"):
        again.assert_within_tolerance()


def test_distances() -> None:
    ours, theirs = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])
    assert relative_distance(theirs, ours) == 1.0
    assert relative_distance(theirs, ours, scale=2 * ours) == 0.5
    assert relative_distance(ours, theirs) == 5.0, "without a scale the distance itself"
    assert largest_distance({"a": ours, "b": theirs}, {"a": ours, "b": ours}) == 1.0
    assert math.isnan(largest_distance({"a": ours * NAN, "b": ours}, {"a": ours, "b": ours}))
    assert total_distance({"a": ours, "b": theirs}, {"a": theirs, "b": theirs}) == 5.0
    assert largest_difference(10 * ours, 11 * ours) == 4.0
    assert largest_error(10 * ours, 11 * ours) == pytest.approx(1 / 11)
    assert largest_error(ours / 10, ours / 8) == pytest.approx(0.1), "absolute below one"
    assert largest_error(ours[:0], ours[:0]) == largest_difference(ours[:0], ours[:0]) == 0.0


def test_other_names_or_shapes_are_refused() -> None:
    one, two = torch.ones(1), torch.ones(2)
    for measure in (relative_distance, largest_difference, largest_error):
        with pytest.raises(AssertionError, match="Size"):
            measure(one, two)  # would broadcast
    for measure in (largest_distance, total_distance):
        with pytest.raises(AssertionError, match="extra"):
            measure({"a": one, "extra": one}, {"a": one})
