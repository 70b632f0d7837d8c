# SPDX-License-Identifier: Apache-2.0
"""A rank does not outlive its launcher: from its first moments on, a thread sees whether the launcher is still there.

A launcher that is killed cannot tell its ranks. Before the ranks have met, and where each computes by itself, nothing
else would: they wait for minutes in the rendezvous, and hold the lock of the run. Looking at the parent is not enough.
A rank that starts slowly may have lost it already, and between the two there may be a wrapper (a profiler, a shell). So
a launcher of ours says in the environment which process it is; of another's the parent is taken, as early as may be.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# PID@NAMESPACE: in another namespace, as in a container of its own, a rank knows the process by another number or not
# at all. Set by this module and by slurm/rank.sh.
VARIABLE = "MEGATRON_G2RPO_LAUNCHER"
INTERVAL_S = 1.0
_PARENT = os.getppid()  # now: what follows, torch's import first of all, takes seconds


def _have_another_parent() -> None:
    """In a fork of this process."""
    global _PARENT
    _PARENT = os.getppid()


os.register_at_fork(after_in_child=_have_another_parent)


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Say to the processes that are started in the body that this one is their launcher."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = f"{os.getpid()}@{_namespace()}"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


class Launcher:
    """The launcher of this rank, whose environment says so: that of this package, of Slurm's scripts, or torchrun.

    Attributes:
        pid: its process id, or that of the parent where it is another's; None: this process has none that is known.
    """

    def __init__(self) -> None:
        number, _, namespace = os.environ.get(VARIABLE, "").partition("@")
        self._named = number.isdecimal() and namespace == _namespace() != ""
        self.pid: int | None = None
        if self._named:
            self.pid = int(number)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            self.pid = _PARENT
        self._started: str | None = None  # at the first look

    def has_ended(self) -> bool:
        """Return whether it is known to have ended."""
        if self.pid is None:
            return False
        if self._named:
            try:
                started = _started(self.pid)
            except OSError:  # of this process, as by too many open files: nothing is known
                return False
            self._started = self._started or started
            return started is None or started != self._started  # the number may be another process's by now
        return os.getppid() != self.pid or (self.pid == 1 and not _first_may_launch())


def watch() -> None:
    """End this process, with 1 and a line, soon after its launcher; nothing where it is no rank of one."""
    launcher = Launcher()
    if "RANK" in os.environ and launcher.pid is not None:
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _watch(launcher: Launcher) -> None:
    while not launcher.has_ended():
        time.sleep(INTERVAL_S)
    line = f"error: rank {os.environ['RANK']}: the launcher of this rank (process {launcher.pid}) has ended\n"
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, line.encode())
    os._exit(1)


def _namespace() -> str:
    """What tells this process's namespace of process ids from others; empty where that cannot be known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is none, or it has ended and is not yet reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _first_may_launch() -> bool:
    """Whether process 1 may be a torchrun, as in a container; else a rank has fallen to it, as orphans do."""
    try:
        program = Path("/proc/1/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return True
    return b"python" in os.path.basename(program)
