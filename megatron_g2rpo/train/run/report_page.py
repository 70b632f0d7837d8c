# SPDX-License-Identifier: Apache-2.0
"""The page of ``megatron-g2rpo report``, written while a run goes on: by a process of its own, which no rank waits for.

It is the same command that a user would start. A page that cannot be written is said once, and never ends a run.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_g2rpo import progress

FINISH_S = 300.0  # seconds that the end of a run waits for its page
NICENESS = 10  # the ranks go first
_SLICE_S = 2.0  # seconds between two signs of life while it is waited for
# What would make a rank of the process, or give it a GPU to hold memory on.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MEGATRON_G2RPO_LAUNCHER")


class ReportPage:
    """Writes the page of a run. On a rank that is not enabled it does nothing.

    Args:
        run: the run directory.
        enabled: whether this rank writes it.
        note: shows the user a line.
    """

    def __init__(self, run: Path, *, enabled: bool, note: Callable[[str], None]) -> None:
        self._run, self._enabled, self._note = run, enabled, note
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._warned = self._failed = False  # a line was said; the last attempt failed
        self._logged = -1  # bytes of metrics that the page is made of

    def begin(self) -> None:
        """Begin to write the page, from what the run directory holds now, unless one is being written."""
        if not self._enabled or self._is_writing():
            return
        self._start()

    def finish(self) -> None:
        """Wait for the page, and say where it is.

        One that was begun before the last step was logged lacks it, and is written once more.
        """
        if not self._enabled or self._process is None:
            return
        progress.enter("report")
        self._wait()
        if self._stale() and not self._failed:
            self._start()
            self._wait()
        page = self._run / "report" / "report.html"
        if page.exists() and not self._failed:
            self._note(f"report: {page}")

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        command = [sys.executable, "-m", "megatron_g2rpo.cli", "report", str(self._run)]
        self._logged, self._failed = self._state(), False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it is read when the process has ended)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            )
        except OSError as error:
            self._warn(str(error))
            return
        with contextlib.suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        atexit.register(_end, self._process)

    def _state(self) -> int:
        try:
            return (self._run / "metrics.jsonl").stat().st_size
        except OSError:
            return -1

    def _stale(self) -> bool:
        return self._state() != self._logged

    def _is_writing(self) -> bool:
        """Whether a page is being written; of one that is done, whatever went wrong is said."""
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._settle()
        return False

    def _wait(self) -> None:
        if self._process is None:  # it could not be started
            return
        deadline = time.monotonic() + FINISH_S
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                self._warn(f"it took longer than {FINISH_S:.0f} s; write it with `megatron-g2rpo report {self._run}`")
                break
            progress.advance()  # the run is at its end, and does not hang
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SLICE_S)
        self._settle()

    def _settle(self) -> None:
        assert self._process is not None
        assert self._errors is not None
        atexit.unregister(_end)
        code, self._process = self._process.returncode, None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        if code:
            self._warn(lines[-1] if lines else f"exit code {code}")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._note(f"warning: the report was not written: {why}")
        self._warned = self._failed = True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still at work."""
    if process.poll() is None:
        process.kill()
        process.wait()
