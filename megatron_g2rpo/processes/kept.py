# SPDX-License-Identifier: Apache-2.0
"""A program that ends with the process that started it, however that one ends, and so does all that it starts itself.

    python -m megatron_g2rpo.processes.kept LEASE GRACE_S PROGRAM [ARGUMENT ...]

is what ``Kept`` starts: a keeper, which starts the program and holds the reading end of a pipe, the lease. When nobody
holds the other end any more (its owner closed it, exited, or was killed) the keeper ends the program and every
descendant with SIGKILL, which none can ignore. Libraries start servers of their own that leave their session, or whose
parent ends first; the keeper is the subreaper of all of them, so that none falls to process 1 and stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

# <linux/prctl.h>
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.2
# Seconds that what the program started has to end by itself after it.
STRAGGLERS_S = 5.0
# Seconds after which a process that SIGKILL does not end, as one that waits for a dead disk, is left.
_UNKILLABLE_S = 10.0
_AT_ONCE = b"!"


class Kept:
    """A program with a pipe to its standard input, which does not outlive this process.

    Signals to this process's group or terminal do not reach it.

    Args:
        program: program and arguments.
        output: file that its standard output and error are added to.
        grace_s: seconds that it has to end by itself, by the end of its standard input, once this process is gone.

    Attributes:
        stdin: its standard input, bytes.

    Raises:
        OSError: it cannot be started, or the file not be written.
    """

    def __init__(self, program: Sequence[str], output: Path, *, grace_s: float) -> None:
        lease, self._lease = os.pipe()
        try:
            with output.open("ab") as file:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(lease), str(grace_s), *program],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=file,
                    pass_fds=(lease,),
                    start_new_session=True,
                )
        except OSError:
            os.close(self._lease)
            raise
        finally:
            os.close(lease)
        assert self._keeper.stdin is not None
        self.stdin: IO[bytes] = self._keeper.stdin

    @property
    def pid(self) -> int:
        """Process id of the keeper, whose only child is the program."""
        return self._keeper.pid

    def poll(self) -> int | None:
        """Return the program's exit code, 128 + number where a signal ended it; None while it runs."""
        return self._keeper.poll()

    def wait(self, seconds: float) -> int | None:
        """Return the program's exit code, after at most so many seconds; None: it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._keeper.wait(seconds)
        return None

    def end(self) -> None:
        """End the program and what it started, at once."""
        if self._keeper.poll() is None:
            with contextlib.suppress(OSError):
                os.write(self._lease, _AT_ONCE)
        os.close(self._lease)
        if self.wait(_UNKILLABLE_S + 1.0) is None:
            self._keeper.kill()
            self._keeper.wait()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: also a program whose keeper is killed goes."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlast_signals() -> None:
    """Go on after the signals that ask a run to stop, which its processes all get from Slurm: a run still needs them.

    What this process starts gets them as usual.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: None)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":  # elsewhere the lease alone ends a program
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _keep(lease: int, grace_s: float, program: Sequence[str]) -> int:
    """Run the program to its end or that of the lease; its exit code."""
    outlast_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(program)
    # Its standard input is the program's alone: whoever writes to it must see when that is gone.
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    while child.poll() is None:
        if select.select([lease], [], [], POLL_S)[0]:
            if os.read(lease, 1) != _AT_ONCE:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(grace_s)
            break
    code = child.poll()
    _end_descendants(0.0 if code is None else STRAGGLERS_S, lease)
    if code is None:
        return 128 + signal.SIGKILL
    return code if code >= 0 else 128 - code


def _end_descendants(patience_s: float, lease: int) -> None:
    """Wait for all descendants, so long as the lease is held, then kill them."""
    start = time.monotonic()
    while descendants := psutil.Process().children(recursive=True):
        waited = time.monotonic() - start
        if waited >= patience_s or select.select([lease], [], [], 0.0)[0]:
            for each in descendants:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        if waited >= patience_s + _UNKILLABLE_S:
            return
        time.sleep(0.05)
        with contextlib.suppress(ChildProcessError):  # those that fell to this process, too
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
