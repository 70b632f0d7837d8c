# SPDX-License-Identifier: Apache-2.0
"""Who is at work in a directory: a lock that the operating system takes back, however its owner ends.

It is ``flock`` on a file. Two processes of a job hold it together, the launcher and the first rank, so that it is held
as long as either can still write. A job that starts asks for it alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path
from types import TracebackType

from megatron_g2rpo.weights.files import naming

LOCK_FILE = ".lock"
# Of file systems that were mounted without locks: NFS, Lustre.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


class DirectoryInUseError(ValueError):
    """Another job is at work in a directory."""


class Lock:
    """A lock on a directory, held until ``release`` or the end of the process. A forked process does not hold it.

    Args:
        directory: the directory; it is created.
        key: the recipe's key that names it, for the error.
        shared: whether it is held together with other processes of the same job, as after ``share``.
        wait_s: seconds to wait for the end of another job.

    Attributes:
        note: a line for the user if the directory's file system knows no locks; else empty.

    Raises:
        DirectoryInUseError: another job holds it; names its host, process and run, and since when.
        OSError: the directory or the file cannot be made; names the key.
    """

    def __init__(self, directory: Path, key: str, *, shared: bool = False, wait_s: float = 0.0) -> None:
        self._directory, self.note = directory, ""
        how, end = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + wait_s
        while True:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise OSError(f"{key}: {directory} cannot be written to: {error.strerror}") from error
            try:
                fcntl.flock(self._file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(self._file)
                os.close(self._file)
                if time.monotonic() < end:
                    time.sleep(0.5)
                    continue
                raise DirectoryInUseError(
                    f"{key}: {directory} is in use by {owner}; wait for its end or end it, or name another directory"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(self._file)
                    raise OSError(error.errno, error.strerror, str(directory / LOCK_FILE)) from error
                self.note = (
                    f"{key}: the file system of {directory} knows no locks ({error.strerror}): "
                    "see to it that no second run is started there"
                )
            if _is_at(self._file, directory / LOCK_FILE):
                break
            os.close(self._file)  # it was moved aside in between
        _HELD.add(self)

    def say(self, run_id: str) -> None:
        """Write down who holds the lock, for those that are refused."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        with naming(self._directory / LOCK_FILE):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(owner).encode() + b"\n", 0)

    def share(self) -> None:
        """Let other processes of the job hold the lock, too."""
        if not self.note:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self) -> None:
        """Give the lock back. Its file stays: one that is removed could be held twice."""
        if self in _HELD:
            _HELD.remove(self)
            os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def owner_of(directory: Path) -> str:
    """Return who is at work in a directory, in words; empty if nobody is, or none of those that this user may know."""
    try:
        file = os.open(directory / LOCK_FILE, os.O_RDWR)  # NFS locks nothing that is open for reading alone
    except OSError:
        try:
            file = os.open(directory / LOCK_FILE, os.O_RDONLY)
        except OSError:
            return ""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(file)
    except OSError:
        return ""
    finally:
        os.close(file)
    return ""


def _owner(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"run {owner['run_id']} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (ValueError, KeyError, TypeError):
        return "another run, which has just started"


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _release_all() -> None:
    for lock in list(_HELD):
        lock.release()


# A process that outlives its parent must not keep its lock; closing a copy of the file leaves the parent's lock alone.
os.register_at_fork(after_in_child=_release_all)
