# SPDX-License-Identifier: Apache-2.0
"""Claim: the newest checkpoint and the best ones stay, whatever order they come in."""

from __future__ import annotations

import math

import pytest

from megatron_g2rpo.train.run.retention import Retention

NAME = "val/mean_reward"


def checkpoints(**values: float | None) -> dict[int, dict[str, float]]:
    return {
        int(step.removeprefix("step_")): {} if value is None else {NAME: value, "val/other": -value}
        for step, value in values.items()
    }


def test_all_are_kept_without_a_number() -> None:
    assert Retention().kept(checkpoints(step_1=0.5, step_2=None)) == {1, 2}
    assert Retention(None, NAME).kept(checkpoints(step_1=0.5, step_2=0.1)) == {1, 2}


def test_without_a_metric_the_newest_are_kept() -> None:
    assert Retention(2).kept(checkpoints(step_2=0.9, step_9=0.1, step_10=0.2)) == {9, 10}
    assert Retention(2).kept({}) == set()


def test_the_newest_stays_beside_the_best() -> None:
    found = checkpoints(step_1=0.1, step_2=0.9, step_3=0.8, step_4=0.2)
    assert Retention(2, NAME).kept(found) == {2, 3, 4}
    assert Retention(1, NAME).kept(found) == {2, 4}


def test_the_newest_may_be_one_of_the_best() -> None:
    assert Retention(2, NAME).kept(checkpoints(step_1=0.1, step_2=0.5, step_3=0.9)) == {2, 3}


def test_lower_can_be_better() -> None:
    found = checkpoints(step_1=0.1, step_2=0.9, step_3=0.8, step_4=0.2)
    assert Retention(1, NAME, higher_is_better=False).kept(found) == {1, 4}


def test_of_equals_the_newer_is_kept() -> None:
    """Checkpoints between two validations have the metrics of the same one."""
    found = checkpoints(step_1=0.5, step_2=0.5, step_3=0.4)
    assert Retention(1, NAME).kept(found) == {2, 3}
    assert Retention(1, NAME, higher_is_better=False).kept(checkpoints(step_1=0.5, step_2=0.5, step_3=0.6)) == {2, 3}


@pytest.mark.parametrize("absent", [None, math.nan])
def test_one_without_the_metric_comes_after_those_that_have_it(absent: float | None) -> None:
    found = checkpoints(step_1=-3.0, step_2=absent, step_3=absent, step_4=absent)
    assert Retention(2, NAME).kept(found) == {1, 4}
