# SPDX-License-Identifier: Apache-2.0
"""Claims: a launcher waits for ranks that were asked to stop, and says so by its exit code; of a failed job it ends the
other ranks at once and reports the one that failed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, sys, time
from pathlib import Path
from megatron_g2rpo.train.run import signals
rank, what, folder = os.environ["RANK"], sys.argv[1], Path(sys.argv[2])
with signals.watched():
    signals.current().begin()
    (folder / rank).touch()
    if what == "fails" and rank == "1":
        sys.exit(3)
    while what != "stops" or signals.current().number is None:
        time.sleep(0.01)
    time.sleep(int(rank))  # its checkpoint
    signals.current().saved()
    (folder / f"{rank}.saved").touch()
    time.sleep(1.5 * (1 - int(rank)))  # saved on all ranks
    sys.exit(signals.STOPPED)
"""


def launched(folder: Path, what: str, *numbers: int) -> tuple[int, str, float]:
    """Exit code and messages of a launcher of two ranks that is sent signals, and the seconds that it took to end."""
    (folder / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-m", "megatron_g2rpo.commands.torchrun", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(folder / "rank.py"), what, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            limit = time.monotonic() + 200.0
            while not ((folder / "0").exists() and (folder / "1").exists()):
                assert process.poll() is None
                assert time.monotonic() < limit, "the ranks did not start"
                time.sleep(0.01)
            start = time.monotonic()
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.2)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, error, time.monotonic() - start


def test_ranks_that_are_asked_are_waited_for(tmp_path: Path) -> None:
    code, error, _ = launched(tmp_path, "stops", signal.SIGUSR1)
    assert code == 75, error
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


@pytest.mark.full
def test_a_second_signal_ends_ranks_that_hang(tmp_path: Path) -> None:
    code, _, _ = launched(tmp_path, "hangs", signal.SIGTERM, signal.SIGINT)
    assert code == 128 + signal.SIGINT


@pytest.mark.full
def test_a_rank_that_fails_ends_one_that_would_go_on_saving(tmp_path: Path) -> None:
    code, error, seconds = launched(tmp_path, "fails")
    assert code == 1
    assert "exitcode  : 3" in error, error
    assert "exitcode  : -9" not in error, "that is what the launcher did to the other"
    assert seconds < 20.0, "torchrun alone takes 30: the other waits for a safe point"
