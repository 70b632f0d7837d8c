# SPDX-License-Identifier: Apache-2.0
"""What ranks say of themselves to each other, through the job's store: where they are, every few seconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Time that the store has to answer.
STORE_LIMIT = timedelta(seconds=10)
# Bytes of a message that are sent to other ranks.
_LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: number of the beat; a rank whose number does not grow has stopped.
        host: name of its machine.
        pid: its process id there.
        step, phase, phases: where it is, see ``progress.Mark``.
        idle: seconds since it did a part of its work.
        waits: whether its main thread is in a collective.
        place: line of the program that its main thread is at.
        left: whether it has ended in order, or has said why it ends.
    """

    number: int
    host: str
    pid: int
    step: int
    phase: str
    phases: int
    idle: float
    waits: bool
    place: str
    left: bool = False


class Board:
    """The beats of all ranks, in the job's store.

    Args:
        store: an own connection to it.
        size: number of ranks.

    Attributes:
        beats: the newest beat of each rank that was read.
    """

    def __init__(self, store: dist.Store, size: int) -> None:
        store.set_timeout(STORE_LIMIT)
        self._store, self._size = dist.PrefixStore("watchdog", store), size
        self.beats: dict[int, Beat] = {}
        self._seen: dict[int, float] = {}

    def publish(self, rank: int, beat: Beat) -> None:
        """Publish a rank's beat."""
        self._store.set(f"beat/{rank}", json.dumps(asdict(beat)))

    def read(self) -> dict[int, Beat]:
        """Read the beats of all ranks that have published one."""
        present = [rank for rank in range(self._size) if rank in self.beats or self._store.check([f"beat/{rank}"])]
        now = time.monotonic()
        values = self._store.multi_get([f"beat/{rank}" for rank in present]) if present else []
        for rank, value in zip(present, values, strict=True):
            beat = Beat(**json.loads(value))
            if rank not in self.beats or self.beats[rank].number != beat.number:
                self.beats[rank] = beat
                self._seen[rank] = now
        return self.beats

    def silent(self, limit: float) -> list[int]:
        """Ranks that have not left and whose beats, as they were read, have not changed for ``limit`` seconds."""
        now = time.monotonic()
        return [rank for rank, since in self._seen.items() if now - since > limit and not self.beats[rank].left]

    def forget(self) -> None:
        """Measure anew how long the beats of the others take."""
        self.beats.clear()
        self._seen.clear()

    def say_why(self, rank: int, message: str) -> None:
        """Publish why a rank ends."""
        self._store.set(f"why/{rank}", message[:_LONGEST_MESSAGE])
        self._store.add("whys", 1)

    def reasons(self) -> dict[int, str]:
        """Why ranks have ended, of those that said it."""
        if self._store.add("whys", 0) == 0:
            return {}
        ranks = [rank for rank in range(self._size) if self._store.check([f"why/{rank}"])]
        return {rank: self._store.get(f"why/{rank}").decode() for rank in ranks}

    def claim(self) -> bool:
        """Whether this rank is the first that judges."""
        return self._store.add("claims", 1) == 1

    def publish_verdict(self, message: str) -> None:
        """Publish what every rank ends with."""
        self._store.set("verdict", message)

    def verdict(self) -> str | None:
        """What a rank has found, if one has."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def wait_for_stacks(self, limit: float) -> None:
        """Say that this rank's stacks are written, and wait for the others', not longer than ``limit`` seconds."""
        deadline = time.monotonic() + limit
        count = self._store.add("stacks", 1)
        while count < self._size and time.monotonic() < deadline:
            time.sleep(0.1)
            count = self._store.add("stacks", 0)


class Line:
    """A rank's line to the board: its threads may ask, and none waits longer than ``STORE_LIMIT`` for an answer.

    Of a store whose host is lost, a new connection is tried for the half an hour that process groups have, and where
    the host does not even refuse, a call lasts for ever, whatever timeout the store was given. So there is one
    connection, and each question is asked in a thread of its own, which may be left behind.

    Args:
        connect: opens the connection; called at the first question.
    """

    def __init__(self, connect: Callable[[], Board]) -> None:
        self._connect = connect
        self._board: Board | None = None
        self._lock = threading.Lock()  # one question at a time
        self._asking: threading.Thread | None = None
        self._gone: dist.DistNetworkError | None = None

    def ask(self, question: Callable[[Board], T]) -> T:
        """Return what ``question`` returns of the board.

        Raises:
            DistNetworkError: the store's host is gone, and is not asked again; or it has not answered in time.
            DistError: the store answered with an error.
        """
        if not self._lock.acquire(timeout=STORE_LIMIT.total_seconds()):
            raise _unanswered()
        try:
            return self._ask(question)
        finally:
            self._lock.release()

    def _ask(self, question: Callable[[Board], T]) -> T:
        if self._gone is not None:
            raise self._gone
        if self._asking is not None and self._asking.is_alive():  # and was waited for
            raise _unanswered()
        answers: list[T] = []
        errors: list[Exception] = []

        def put() -> None:
            try:
                if self._board is None:
                    self._board = self._connect()
                answers.append(question(self._board))
            except Exception as error:  # noqa: BLE001 (raised below, in the thread that asks)
                if isinstance(error, dist.DistNetworkError):
                    self._gone = error  # also where nobody waits any more
                errors.append(error)

        self._asking = threading.Thread(target=put, name="watchdog-store", daemon=True)
        self._asking.start()
        if not _ended(self._asking):
            raise _unanswered()
        if errors:
            raise errors[0]
        return answers[0]


def _unanswered() -> dist.DistNetworkError:
    return dist.DistNetworkError(f"the store has not answered in {STORE_LIMIT.total_seconds():g} s")


def _ended(thread: threading.Thread) -> bool:
    """Whether a thread ends in ``STORE_LIMIT``; of a time for which the job was suspended, little counts."""
    for _ in range(10):
        thread.join(STORE_LIMIT.total_seconds() / 10)
        if not thread.is_alive():
            return True
    return False
