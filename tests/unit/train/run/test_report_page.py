# SPDX-License-Identifier: Apache-2.0
"""Claim: a run writes its page by a process of its own, and whatever happens to that never ends the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_g2rpo.train.run import report_page
from megatron_g2rpo.train.run.report_page import ReportPage
from tests.common.recorded_run import write_recorded_run


def test_the_page_is_written_and_named(tmp_path: Path) -> None:
    run, notes = write_recorded_run(tmp_path / "run", steps=2), []
    page = ReportPage(run, enabled=True, note=notes.append)
    page.begin()
    page.begin()  # while the first is being written: nothing
    page.finish()
    assert notes == [f"report: {run / 'report' / 'report.html'}"]
    assert (run / "report" / "report.html").stat().st_size > 1_000_000


def test_a_page_that_lacks_the_last_steps_is_written_again(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=2)
    page = ReportPage(run, enabled=True, note=lambda line: None)
    page.begin()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 77, "train/reward": 1.0}\n')
    page.finish()
    assert "77 steps" in (run / "report" / "report.html").read_text("utf-8")


def test_a_page_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    notes: list[str] = []
    page = ReportPage(tmp_path, enabled=True, note=notes.append)  # no run
    page.begin()
    page.finish()
    page.begin()
    page.finish()
    assert len(notes) == 1
    assert notes[0].startswith("warning: the report was not written: ")
    assert "metrics.jsonl" in notes[0]


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def hanging(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(start([sys.executable, "-c", "import time; time.sleep(600)"], **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(report_page.subprocess, "Popen", hanging)
    monkeypatch.setattr(report_page, "FINISH_S", 0.1)
    notes: list[str] = []
    page = ReportPage(tmp_path, enabled=True, note=notes.append)
    page.begin()
    page.finish()
    assert len(notes) == 1
    assert "took longer" in notes[0]
    assert started[0].poll() is not None


def test_a_rank_that_is_not_the_first_does_nothing(tmp_path: Path) -> None:
    page = ReportPage(tmp_path, enabled=False, note=lambda line: pytest.fail(line))
    page.begin()
    page.finish()
    assert list(tmp_path.iterdir()) == []
