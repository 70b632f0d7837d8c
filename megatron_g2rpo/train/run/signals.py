# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: the first is kept until the run comes to a safe point, the second ends the process.

Python calls its handlers in the main thread, between two of its instructions, so a rank that waits in a collective for
its peers would hear nothing until they come. What is received is therefore acted on in a thread of its own, which the
interpreter's C handler wakes through a pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from megatron_g2rpo.train.run import slurm_time

# Of the user, of Slurm's --signal, of Ctrl-C and of a terminal that is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher's way to pass a request on: unlike those, any number of them is one request. So a signal that reaches a
# launcher and its ranks alike is not taken for two.
FORWARDED = signal.SIGUSR2
# The same signal again within so many seconds is the same request: torchrun and srun pass on what ranks were sent too.
SAME_REQUEST_S = 1.0
STOPPED = 75  # sysexits.h, EX_TEMPFAIL: all is saved, start the same command again

STARTED = time.monotonic()


class SignalWatch:
    """While it is entered, a function is told of the stop signals of this process, in a thread.

    A signal that is ignored (nohup) stays ignored. Only a process's main thread may set handlers; in any other thread
    it does nothing.

    Args:
        on_signal: called with a signal's number.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._ends.callback(os.close, write)  # which ends the thread
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._ends.callback(signal.set_wakeup_fd, before)
        for number in (*STOP_SIGNALS, FORWARDED):
            handler = signal.getsignal(number)
            if handler is signal.SIG_IGN:
                continue
            signal.signal(number, _nothing)
            signal.siginterrupt(number, False)
            self._ends.callback(signal.signal, number, handler)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    def _watch(self, read: int) -> None:
        with open(read, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                if received[0] in (*STOP_SIGNALS, FORWARDED):
                    self._on_signal(received[0])


def _nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal in Python: the thread has it already."""


def _forget() -> None:
    """In a fork, which has the handlers and the pipe but not the thread: let signals do again what they do."""
    if any(signal.getsignal(number) is _nothing for number in (*STOP_SIGNALS, FORWARDED)):
        signal.set_wakeup_fd(-1)
        for number in (*STOP_SIGNALS, FORWARDED):
            if signal.getsignal(number) is _nothing:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


class Repeats:
    """Tells the second request from the first one that arrives twice."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def is_second(self, number: int) -> bool:
        """Note a signal, and return whether it is another request than the first."""
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            return False
        first, when = self._first
        return number != first or now - when > SAME_REQUEST_S


class StopRequest:
    """What a process of a run has been asked to do by signals, and what it does about it.

    - Before the run has begun, nothing can be lost: it ends at once, with ``STOPPED``; with 1 where the time of its
      Slurm job is over by then.
    - In the run, the first request is kept; the second ends the process, with 128 and the signal's number.
    - After the run, the first one changes nothing any more; the second ends the process as in the run.
    - When all ranks have saved because one was asked, a further one ends it with ``STOPPED``.

    Attributes:
        number: the signal that asked first; None: none did.
        is_notice: whether it was no more than Slurm's notice of the end of its job.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_notice = False
        self._running = self._done = self._saved = False
        self._repeats = Repeats()

    def begin(self) -> None:
        """Keep requests from now on."""
        self._running = True

    def done(self) -> None:
        """Say that there is nothing left to stop: what this process still does leads to its end."""
        self._running = self._done = True

    def saved(self) -> None:
        """Say that there is nothing left to lose, on any rank."""
        self._saved = True

    def received(self, number: int) -> None:
        """Act on a signal."""
        if self._saved:
            os._exit(STOPPED)
        name, is_notice = described(number), slurm_time.is_notice(number, FORWARDED)
        if not self._running and is_notice:  # the next job of the same length would come no further
            _end(1, f"stopped by {slurm_time.SLURM_END_NAME} before the first step: {slurm_time.LONGER}")
        if not self._running:
            _end(STOPPED, f"stopped by {name} before the first step; the same command starts the run")
        if number != FORWARDED and self._repeats.is_second(number):
            _end(128 + number, f"ended by {name}; the same command goes on from the newest checkpoint")
        if self.number is None:
            self.number, self.is_notice = number, is_notice
            follows = "the run is about to end" if self._done else "the run saves as soon as it can, and stops"
            _say(f"asked to stop by {name}: {follows}; a second signal ends it at once")


def described(number: int) -> str:
    """Return what a signal is called in a message."""
    return "a signal to its launcher" if number == FORWARDED else signal.Signals(number).name


def _end(code: int, line: str) -> NoReturn:
    _say(line)
    os._exit(code)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"{line}\n".encode())


_current: StopRequest | None = None


def current() -> StopRequest:
    """Return the request that signals to this process make; one that nobody makes where they are not watched."""
    return StopRequest() if _current is None else _current


_for_good = False


def for_good() -> None:
    """Let the next watch last as long as this process, for a program: signals must not change how it ends, either.

    When Python shuts down its threads, and with them the watch, signals do nothing. Call it before what registers
    itself for the shutdown, as torch does, is imported: a shutdown that hangs there can then still be ended.
    """
    global _for_good
    _for_good = True
    atexit.register(_ignore)


def _ignore() -> None:
    for number in (*STOP_SIGNALS, FORWARDED):
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Watch for signals that ask this process's run to stop. To enter early: until then they do what they always do."""
    global _current
    before, _current = _current, StopRequest()
    with contextlib.ExitStack() as watch:
        watch.enter_context(SignalWatch(_current.received))
        try:
            yield
        finally:
            _current.done()
            if _for_good:
                watch.pop_all()
            else:
                _current = before
