# SPDX-License-Identifier: Apache-2.0
"""Claim: the answers that a validation shows say what they are, and every task has its turn."""

from __future__ import annotations

import pytest

from megatron_g2rpo.train.run.examples import Example, Kind, in_turn, shortened


def example(task: str, kind: Kind, reward: float | None = 0.5) -> Example:
    return Example(task=task, key=f"{task}-7", kind=kind, reward=reward, question="2 + 2?", response="4", reference="4")


EVERY = [example(task, kind) for kind in ("sampled", "greedy") for task in "abc"]


def test_a_line_says_task_key_decoding_and_reward() -> None:
    assert example("a", "greedy").line == "  a a-7, greedy, reward 0.500: '2 + 2?' -> '4' (reference '4')"
    assert "a a-7, sampled, reward failed: " in example("a", "sampled", None).line


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_task_and_both_decodings_have_their_turn(number: int) -> None:
    shown = [[(each.task, each.kind) for each in in_turn(EVERY, number, turn)] for turn in range(6)]
    assert all(len(set(each)) == number for each in shown)
    flat = [each for each_turn in shown for each in each_turn]
    assert {task for task, _ in flat[:3]} == set("abc")
    assert set(flat[:6]) == {(each.task, each.kind) for each in EVERY}


def test_no_more_are_shown_than_there_are_and_none_where_none_are_asked_for() -> None:
    assert len(in_turn(EVERY, 100, 3)) == 6
    assert in_turn(EVERY, 0, 3) == []
    assert in_turn([], 3, 0) == []


def test_of_a_long_text_both_ends_are_shown() -> None:
    assert shortened("a" * 400 + "b" * 400, 10) == "aaaaa [...] bbbbb"
    assert shortened("short", 10) == "short"
