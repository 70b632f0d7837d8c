# SPDX-License-Identifier: Apache-2.0
"""Claim: a program that is forked has what one that is started has: arguments, environment, streams, an end."""

from __future__ import annotations

import signal

import pytest

from tests.common import launch
from tests.common.launch import program

PROGRAM = "tests.unit.telling_program"


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("code", [0, 3])
def test_a_program_is_told_and_tells(monkeypatch: pytest.MonkeyPatch, code: int, forks: bool) -> None:
    monkeypatch.setattr(launch, "can_fork", lambda: forks)
    monkeypatch.setenv("PYTHONPATH", str(launch.ROOT))
    done = program(PROGRAM, str(code), G2RPO_SAID="a word")
    assert done.stdout == f"__main__ ['{code}'] a word None \nat its end\n"
    assert done.stderr == "to standard error\n"
    assert done.returncode == code


def test_its_environment_is_that_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after another program's, and after the process that forks has started."""
    program(PROGRAM, "0", G2RPO_SAID="a word")
    assert " None None " in program(PROGRAM, "0").stdout
    monkeypatch.setenv("G2RPO_SAID", "another")
    assert " another None " in program(PROGRAM, "0").stdout


def test_one_that_takes_too_long_is_killed() -> None:
    assert program("http.server", "0", timeout=1).returncode == -signal.SIGKILL
