# SPDX-License-Identifier: Apache-2.0
"""Claims: a rank ends soon after its launcher, even one that it lost before it looked; nothing else ends it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.run

from megatron_g2rpo.commands import torchrun
from megatron_g2rpo.processes import launcher
from megatron_g2rpo.processes.launcher import VARIABLE, Launcher

ROOT = Path(__file__).resolve().parents[2]
# A rank as its command begins: it waits for what never comes, as in a rendezvous.
RANK = """
import sys, time
from megatron_g2rpo.processes import launcher
launcher.watch()
print("watches", flush=True)
time.sleep(600)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a launcher, and is not the parent of the rank: a wrapper is between the two."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def name(monkeypatch: pytest.MonkeyPatch, pid: int, namespace: str | None = None) -> None:
    monkeypatch.setenv(VARIABLE, f"{pid}@{launcher._namespace() if namespace is None else namespace}")


def test_a_named_launcher_has_ended_when_it_is_gone_reaped_or_not(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    name(monkeypatch, process.pid)
    seen = Launcher()
    assert not seen.has_ended()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert seen.has_ended(), "a container without an init may reap it never"
    process.wait()
    assert seen.has_ended()
    assert Launcher().has_ended(), "nor was it there when this rank first looked"


def test_a_process_that_has_the_number_by_now_is_not_the_launcher(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    name(monkeypatch, process.pid)
    seen = Launcher()
    assert not seen.has_ended()
    monkeypatch.setattr(launcher, "_started", lambda pid: "another moment")
    assert seen.has_ended()


def test_a_rank_that_can_open_no_file_does_not_take_its_launcher_for_gone(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    def fails(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    name(monkeypatch, process.pid)
    monkeypatch.setattr(launcher.Path, "read_text", fails)
    assert not Launcher().has_ended()


def test_what_is_none_of_this_process_s_launchers_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launcher().pid is None, "no rank"
    gone = subprocess.Popen(["true"])
    gone.wait()
    name(monkeypatch, gone.pid, "pid:[1]")
    assert not Launcher().has_ended(), "in a container of its own a rank knows no process outside"
    monkeypatch.setenv(VARIABLE, "?")
    assert not Launcher().has_ended()


def test_of_another_s_torchrun_the_first_parent_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    seen = Launcher()
    assert not seen.has_ended()
    monkeypatch.setattr(launcher.os, "getppid", lambda: 1)
    assert seen.has_ended()


@pytest.mark.parametrize(
    ("program", "ended"), [(b"/sbin/init\0", True), (b"/opt/bin/python3.11\0/opt/bin/torchrun\0", False)]
)
def test_a_rank_that_began_as_an_orphan_is_told_from_one_in_a_container(
    monkeypatch: pytest.MonkeyPatch, program: bytes, ended: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(launcher, "_PARENT", 1)
    monkeypatch.setattr(launcher.os, "getppid", lambda: 1)
    monkeypatch.setattr(launcher.Path, "read_bytes", lambda path: program)
    assert Launcher().has_ended() is ended


def test_a_rank_whose_launcher_was_killed_while_it_started_ends_and_says_so(
    process: subprocess.Popen[bytes],
) -> None:
    """Killed after the rank has looked once; the rank's own parent, this process, lives on."""
    variables = {"RANK": "1", VARIABLE: f"{process.pid}@{launcher._namespace()}", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", RANK],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "watches\n"
            process.send_signal(signal.SIGKILL)
            _, error = rank.communicate(timeout=60)
        finally:
            rank.kill()
    assert rank.returncode == 1
    assert error == f"error: rank 1: the launcher of this rank (process {process.pid}) has ended\n"


@pytest.mark.parametrize("run", [torchrun.run, torchrun.run_plainly])
def test_ranks_are_told_which_process_launches_them(monkeypatch: pytest.MonkeyPatch, run) -> None:
    told: list[Launcher] = []
    monkeypatch.setattr(torch.distributed.run, "main", lambda arguments: told.append(Launcher()))
    assert run(["-m", "module"]) == 0
    assert [each.pid for each in told] == [os.getpid()]
    assert VARIABLE not in os.environ
