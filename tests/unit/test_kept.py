# SPDX-License-Identifier: Apache-2.0
"""Claim: a kept program ends with the process that started it, however that ends, and nothing that it started stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_g2rpo.processes.kept import Kept

# Seconds that a busy machine may take for what is awaited here.
LONG = 60.0
# Ignores what asks it to end, and so does what it starts: a daemon in a session of its own, whose parent has left.
STUBBORN = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
pids = [os.getpid()]
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, f"{os.getpid()}".encode())
        time.sleep(1000)
    os._exit(0)
pids.append(int(os.read(read, 20)))
with open(sys.argv[1] + ".partial", "w") as file:
    print(*pids, file=file)
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(1000)
"""
OWNER = """
import sys, time
from pathlib import Path
from megatron_g2rpo.processes.kept import Kept
kept = Kept([sys.executable, "-c", sys.argv[1], sys.argv[2]], Path(sys.argv[3]), grace_s=0.0)
print(kept.pid, flush=True)
time.sleep(1000)
"""


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids_in(file: Path) -> list[int]:
    until(file.exists, "the program has not started")
    return [int(word) for word in file.read_text().split()]


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that has started a stubborn program, and the ids of keeper, program and daemon."""
    command = [sys.executable, "-c", OWNER, STUBBORN, str(tmp_path / "pids"), str(tmp_path / "output")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()), *pids_in(tmp_path / "pids")]
        try:
            yield process, pids
        finally:
            process.kill()
            for pid in pids:
                if not is_gone(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_owner_and_so_does_a_daemon_of_its_own(
    owner: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, pids = owner
    assert len(pids) == 3
    assert not any(is_gone(pid) for pid in pids)
    process.send_signal(number)
    process.wait()
    for pid, name in zip(pids, ("keeper", "program", "daemon"), strict=True):
        until(lambda pid=pid: is_gone(pid), f"the {name} is left")


def test_signals_to_keeper_and_owners_group_leave_it_running(
    owner: tuple[subprocess.Popen[str], list[int]],
) -> None:
    """Slurm sends a stop signal to every process of a job; a run that saves still needs what it started."""
    _, pids = owner
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pids[0], number)
    time.sleep(1.0)
    assert not any(is_gone(pid) for pid in pids)
    assert os.getpgid(pids[0]) == pids[0] != os.getpgrp()


def test_it_can_be_ended_at_once_though_it_ignores_what_asks_it_to(tmp_path: Path) -> None:
    program = [sys.executable, "-c", STUBBORN, str(tmp_path / "pids")]
    kept = Kept(program, tmp_path / "output", grace_s=1000.0)
    pids = pids_in(tmp_path / "pids")
    assert kept.poll() is None
    assert kept.wait(0.1) is None
    kept.end()
    assert kept.poll() == 128 + signal.SIGKILL
    assert all(is_gone(pid) for pid in pids)


ECHO = "import sys; print(sys.stdin.read()); print('says', file=sys.stderr); sys.exit(7)"


def test_it_reads_what_it_is_given_and_its_exit_code_is_known(tmp_path: Path) -> None:
    kept = Kept([sys.executable, "-c", ECHO], tmp_path / "output", grace_s=1.0)
    with kept.stdin as pipe:
        pipe.write(b"hello")
    assert kept.wait(LONG) == 7
    kept.end()
    assert sorted((tmp_path / "output").read_text().split()) == ["hello", "says"]


def test_who_writes_to_one_that_has_ended_is_told(tmp_path: Path) -> None:
    """Else a feed would fill its pipe, and wait for ever."""
    kept = Kept([sys.executable, "-c", "import sys; sys.stdin.close()"], tmp_path / "output", grace_s=1.0)
    assert kept.wait(LONG) == 0
    with pytest.raises(BrokenPipeError):
        os.write(kept.stdin.fileno(), b"x")
    kept.end()


def test_a_grace_is_given_to_one_whose_owner_is_gone(tmp_path: Path) -> None:
    """It sees the end of its standard input, and has time to send what is left."""
    last = tmp_path / "last"
    program = f"import sys, time; sys.stdin.read(); time.sleep(0.5); open({str(last)!r}, 'w').close()"
    source = OWNER.replace("grace_s=0.0", "grace_s=60.0")
    command = [sys.executable, "-c", source, program, "-", str(tmp_path / "output")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        keeper = int(process.stdout.readline())
        process.kill()
    until(lambda: is_gone(keeper), "the keeper is left")
    assert last.exists()
