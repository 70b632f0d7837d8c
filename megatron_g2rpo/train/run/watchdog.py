# SPDX-License-Identifier: Apache-2.0
"""Notices that a job makes no progress, says which rank is the cause, and ends it; and which rank is gone.

A thread of each rank publishes a beat in the job's store every few seconds: where the rank is (``progress``), for how
long it has done nothing, and whether its main thread waits in a collective. A rank that hangs makes all others wait, so
that silence alone does not tell who is the cause:

- one whose beats have stopped is itself stopped, or its machine is;
- one that does nothing, and does not wait in a collective, hangs;
- if all wait in collectives, those that have entered the fewest phases are behind.

A rank that waits is not blamed, however long, while another gets on. Whoever notices first publishes the verdict; every
rank writes the stacks of its threads to ``<logger.log_dir>/stacks/rank_N.txt``, and the job ends.

Ranks do not compare clocks: a beat says ages, and its reader measures with its own clock how long the next one takes.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron_g2rpo import progress
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run.beats import STORE_LIMIT, Beat, Board, Line

# Seconds between two beats, at most: a thousand ranks are two hundred messages a second for the store.
LONGEST_INTERVAL = 5.0
# Beats that a rank may leave out, on a busy machine, before it counts as gone.
_MISSED = 3
# Seconds that all ranks have to write their stacks before the job ends.
_STACKS_LIMIT = 5.0
# Seconds without progress after which a rank may be what a collective has waited for in vain.
_LONG = 60.0
# Phases before the first step, whose parts (imports, weights, an engine that compiles) take minutes and say little, and
# seconds that they have at least.
STARTING = ("start", "weights", "data", "engine")
_START_LIMIT = 600.0
_SHOWN_RANKS = 8
# What a collective raises on a rank whose peer has ended: gloo, NCCL, the store.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|gloo.*(Timed out|Read error|Write error)|ncclRemoteError|"
    r"remote process exited|NCCL communicator was aborted",
    re.IGNORECASE | re.DOTALL,
)
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_IN_COLLECTIVE = (os.path.join("torch", "distributed", ""), os.path.join("megatron", "core", ""))


class HangError(TimeoutError):
    """The job makes no progress; the message names the ranks that are the cause."""


class PeerLostError(ConnectionError):
    """Another rank of the job has ended; the message says which."""


@contextmanager
def watching(recipe: Recipe, end: Callable[[BaseException], object]) -> Iterator[None]:
    """Watch the job of this rank while the body runs.

    Args:
        recipe: the run's recipe; ``cluster.watchdog_s`` is the time without progress after which the job is ended.
        end: ends this process with a message; it is called from a thread, while the main thread hangs.

    Raises:
        PeerLostError: a collective of the body failed because another rank has ended.
    """
    watchdog = Watchdog(Path(recipe.logger.log_dir) / "stacks", recipe.cluster.watchdog_s, end)
    watchdog.start()
    try:
        yield
    except Exception as error:
        if not is_lost_peer(error):
            watchdog.say_why(f"{type(error).__name__}: {error}")
            raise
        raise PeerLostError(f"{watchdog.who_is_gone()}\nwhat this rank saw of it: {error}".rstrip()) from error
    finally:
        watchdog.stop()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error is what a collective raises because another rank has ended."""
    if isinstance(error, PeerLostError | dist.DistNetworkError):
        return True
    if isinstance(error, dist.DistBackendError) or type(error) is RuntimeError:
        return bool(_LOST.search(str(error)))
    return False


class Watchdog:
    """The watch of one rank.

    Args:
        stacks: folder for the stacks of all ranks' threads.
        limit: seconds without progress after which the job is ended; None: it is not, but ranks that end are noticed.
        end: ends this process with a message.
    """

    def __init__(self, stacks: Path, limit: float | None, end: Callable[[BaseException], object]) -> None:
        self._limit, self._end = limit, end
        self._rank, self._size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._stacks = stacks / f"rank_{self._rank}.txt"
        self._interval = LONGEST_INTERVAL if limit is None else min(LONGEST_INTERVAL, limit / 10)
        self._line = Line(self._connected)
        self._read_at = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._number = 0

    def start(self) -> None:
        """Begin to watch."""
        with suppress(OSError):  # of an earlier attempt; a folder that cannot be written to is not this one's affair
            self._stacks.unlink(missing_ok=True)
        progress.enter("start", step=0)
        self._thread.start()

    def stop(self) -> None:
        """End the watch, and tell the others that this rank has left."""
        self._stopped.set()
        self._thread.join(timeout=2 * STORE_LIMIT.total_seconds())
        if self._has_line():
            beat = self._beat(left=True)
            with suppress(dist.DistError):
                self._line.ask(lambda board: board.publish(self._rank, beat))

    def say_why(self, message: str) -> None:
        """Tell the other ranks why this one ends; they fail next, and would not know."""
        if self._has_line():
            with suppress(dist.DistError):
                self._line.ask(lambda board: board.say_why(self._rank, message))

    def who_is_gone(self) -> str:
        """Return which ranks have ended, with where they were; it takes some beats to find out."""
        if not self._has_line():
            return "another rank of the job has ended"
        deadline = time.monotonic() + (_MISSED + 2) * self._interval
        try:
            while True:
                beats, reasons, silent = self._line.ask(self._read)
                gone = {rank: beats[rank] for rank in silent if rank not in reasons}
                if reasons:
                    rank = min(reasons)
                    return f"rank {rank}{_of(beats.get(rank))} failed: {reasons[rank]}"
                if gone:
                    what = "have" if len(gone) > 1 else "has"
                    return f"{_listed(gone)} {what} ended without a message; the other ranks cannot go on without it"
                if time.monotonic() > deadline:
                    others = {rank: beat for rank, beat in beats.items() if rank != self._rank}
                    behind = judged(others, [], _LONG) if others else None
                    return f"a collective failed, and all ranks still run{f': {behind}' if behind else ''}"
                time.sleep(self._interval / 2)
        except dist.DistError:
            return _store_is_gone()

    def _read(self, board: Board) -> tuple[dict[int, Beat], dict[int, str], list[int]]:
        """The beats of all ranks, why some have ended, and whose beats no longer come."""
        beats = dict(board.read())
        return beats, board.reasons(), board.silent(_MISSED * self._interval)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before, waited = time.monotonic(), 0.0
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - before > (_MISSED + 1) * self._interval + LONGEST_INTERVAL + waited:
                # This process was stopped, or its machine slept: the job was suspended, it did not hang.
                progress.advance()
                if self._has_line():
                    with suppress(dist.DistError):
                        self._line.ask(lambda board: board.forget())
            before, waited = now, 0.0
            idle, limit = progress.idle(), limit_of(progress.at().phase, self._limit)
            verdict = None
            if self._has_line():
                try:
                    verdict = self._line.ask(self._exchange)
                except dist.DistError:
                    waited = 2 * STORE_LIMIT.total_seconds()
                    # The collectives say the rest, if the loss of a machine ends them.
                    verdict = self._message(_store_is_gone()) if idle > limit else None
            elif idle > limit:
                verdict = self._alone()
            if verdict is not None:
                self._finish(verdict)
                return

    def _exchange(self, board: Board) -> str | None:
        """Publish this rank's beat, and judge the others' when it is time to; the verdict, if there is one."""
        board.publish(self._rank, self._beat())
        verdict = board.verdict()
        now, idle, limit = time.monotonic(), progress.idle(), limit_of(progress.at().phase, self._limit)
        # From half of the time on: a rank that has stopped is known by beats that do not come.
        if verdict is not None or idle <= limit / 2 or now < self._read_at:
            return verdict
        self._read_at = now + max(self._interval, self._size / 50)
        board.read()
        return self._judge(board) if idle > limit else None

    def _has_line(self) -> bool:
        """Whether there are other ranks, and a store between them."""
        return dist.is_initialized() and self._size > 1

    def _connected(self) -> Board:
        """Open an own connection to the store: the main thread may hold the other one in a call that hangs."""
        store = dist.distributed_c10d._get_default_store()
        return Board(store.clone(), self._size)  # pyright: ignore[reportAttributeAccessIssue] - no stub

    def _beat(self, *, left: bool = False) -> Beat:
        self._number += 1
        mark = progress.at()
        waits, place = _main_thread()
        here = socket.gethostname(), os.getpid(), mark.step, mark.phase, mark.number
        return Beat(self._number, *here, progress.idle(), waits, place, left)

    def _alone(self) -> str:
        """The verdict of one process, and of one that has not joined the job yet."""
        return self._message(hanging({self._rank: self._beat()}))

    def _judge(self, board: Board) -> str | None:
        """The verdict, if there is one now, and no other rank has found it."""
        assert self._limit is not None
        silent = board.silent(max(self._limit / 2, _MISSED * self._interval))
        sentence = judged(board.beats, silent, self._limit)  # this rank's own beat is one of them
        if sentence is None or not board.claim():
            return None
        message = self._message(sentence)
        board.publish_verdict(message)
        return message

    def _message(self, sentence: str) -> str:
        folder, limit = self._stacks.parent, limit_of(progress.at().phase, self._limit)
        return (
            f"no progress for {limit:g} s (cluster.watchdog_s): {sentence}\n"
            f"the stacks of all threads are in {folder}/rank_N.txt; a rank without a file could not write it"
        )

    def _finish(self, message: str) -> None:
        self._dump()
        if self._has_line():
            with suppress(dist.DistError):
                self._line.ask(lambda board: board.wait_for_stacks(_STACKS_LIMIT + self._interval))
        self._end(HangError(message))

    def _dump(self) -> None:
        mark = progress.at()
        with suppress(OSError):  # a full disk: the message still comes
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                now = datetime.now().isoformat(sep=" ", timespec="seconds")
                file.write(
                    f"rank {self._rank} on {socket.gethostname()}, step {mark.step}, phase {mark.phase}, {now}\n"
                )
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)


def limit_of(phase: str, limit: float | None) -> float:
    """Return the seconds that a part of a phase may take; infinite where nothing is limited.

    Args:
        phase: the phase, see ``progress``.
        limit: the recipe's ``cluster.watchdog_s``.
    """
    if limit is None:
        return math.inf
    return max(limit, _START_LIMIT) if phase in STARTING else limit


def judged(beats: Mapping[int, Beat], silent: Sequence[int], limit: float) -> str | None:
    """Say which ranks are the cause of a job's silence.

    Args:
        beats: the newest beat of each rank.
        silent: ranks whose beats no longer come.
        limit: seconds without progress that are too many.

    Returns:
        A sentence; None if the job gets on.
    """
    if silent:
        gone = _listed({rank: beats[rank] for rank in silent})
        return f"{gone}: not heard of since; the process is stopped, holds Python's lock, or its machine hangs"
    going = {rank: beat for rank, beat in beats.items() if not beat.left}
    idle = {rank: beat for rank, beat in going.items() if beat.idle > limit_of(beat.phase, limit)}
    busy = {rank: beat for rank, beat in idle.items() if not beat.waits}
    if busy:
        return hanging(_furthest_behind(busy))
    if len(idle) < len(going):
        return None  # these wait for one that gets on
    return f"all ranks wait in collectives; furthest behind: {_listed(_furthest_behind(idle))}"


def hanging(beats: Mapping[int, Beat]) -> str:
    """Say that ranks hang, and where."""
    verb = "hang" if len(beats) > 1 else "hangs"
    return f"{_listed(beats)} {verb}"


def _furthest_behind(beats: Mapping[int, Beat]) -> dict[int, Beat]:
    least = min(beat.phases for beat in beats.values())
    return {rank: beat for rank, beat in beats.items() if beat.phases == least}


def _listed(beats: Mapping[int, Beat]) -> str:
    shown = [f"rank {rank}{_of(beats[rank])}" for rank in sorted(beats)[:_SHOWN_RANKS]]
    more = [f"{len(beats) - _SHOWN_RANKS} more"] if len(beats) > _SHOWN_RANKS else []
    return ", ".join([*shown, *more])


def _of(beat: Beat | None) -> str:
    if beat is None:
        return ""
    idle = f" for {beat.idle:.0f} s" if beat.idle >= 1 else ""
    return f" (host {beat.host}, pid {beat.pid}; step {beat.step}, phase {beat.phase}{idle}, at {beat.place})"


def _main_thread() -> tuple[bool, str]:
    """Whether the main thread is in a collective, and the innermost line of it that is no library's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and any(part in frame.f_code.co_filename for part in _IN_COLLECTIVE)
    innermost: FrameType | None = frame
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return waits, "its end"
    return waits, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _store_is_gone() -> str:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return f"the node that keeps the job's store ({address}) is gone, or its launcher has ended"
