# SPDX-License-Identifier: Apache-2.0
"""Claims: a test hears from every rank of its worker, in order, and a rank that says nothing fails it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.common.launch import report_result, torchrun_json

WORKER = "tests.unit.some_ranks_report_worker"


def test_results_come_in_the_order_of_ranks() -> None:
    assert torchrun_json(2, WORKER, "0", "1") == [{"rank": rank, "error": math.inf} for rank in range(2)]


def test_a_rank_that_says_nothing_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"some_ranks_report_worker: ranks \[1\] reported nothing"):
        torchrun_json(2, WORKER, "0")


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    with pytest.raises(AssertionError, match=r"(?s)\{'0': -9, '1': 1\}.*RuntimeError: rank 1 cannot go on"):
        torchrun_json(2, "tests.unit.failing_rank_worker")


def test_ranks_that_take_too_long_are_killed() -> None:
    with pytest.raises(AssertionError, match=r"exit statuses by rank \{'0': -9\}"):
        torchrun_json(1, "tests.unit.failing_rank_worker", timeout=1)


def test_a_worker_that_is_run_by_hand_prints_its_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("G2RPO_TEST_RESULTS", raising=False)
    # The group of this process is that of other tests, and goes on.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    report_result({"error": 0.5})
    assert capsys.readouterr().out == '{"error": 0.5}\n'
