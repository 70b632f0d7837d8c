# SPDX-License-Identifier: Apache-2.0
"""Processes that reward parts run in, so that one that hangs or crashes costs a response its reward, not the run.

The processes are those of a ``pebble.ProcessPool``: each call has a time limit, and one that exceeds it or dies is
replaced. They are forked from a server without threads that has imported torch once; none is a fork of the training
process, whose threads a fork would not have.

Many responses travel in one task, without the images of their samples, which few parts look at: the first that does is
asked again with them, and so are all that come later. Where a task does not come back, each part is asked of each
response alone, so that only what hangs or crashes has no value.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch
from pebble import ProcessExpired, ProcessPool

from megatron_g2rpo.processes import forkserver
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.recipe.imports import import_all
from megatron_g2rpo.tasks.part_calls import Ask, Call, Options, Outcome, ask_batch, ask_in_turn, failed_batch, raised
from megatron_g2rpo.types import Sample

# Responses of one task: enough that a task costs more than sending it, few enough that workers share the work evenly.
CHUNK = 32
# Time for the processes to start, seconds: the imports of torch and of a user's files, on many ranks of a busy machine.
START_LIMIT_S = 300.0


class RewardWorkers:
    """A pool of processes that reward parts run in. It starts with the first task, or with ``start``.

    Args:
        number: number of processes.
        imports: the recipe's ``imports``, which register a user's parts in every process.
        options: part -> its options.
        timeout_s: seconds that a call of a part may take.
        batch_timeout_s: seconds that a call of a batched part may take.
    """

    def __init__(
        self, number: int, *, imports: Sequence[str], options: Options, timeout_s: float, batch_timeout_s: float
    ) -> None:
        self._number, self._imports, self._options = number, list(imports), options
        self._timeout_s, self._batch_timeout_s = timeout_s, batch_timeout_s
        self._pool: ProcessPool | None = None
        self._ready: Future[Any] | None = None
        self._starter: threading.Thread | None = None
        self._sends_images = False

    @classmethod
    def of(cls, env: Env, imports: Sequence[str]) -> RewardWorkers | None:
        """Return the workers that a recipe asks for; None where parts run in this process."""
        if env.reward_workers == 0:
            return None
        return cls(
            env.reward_workers,
            imports=imports,
            options=env.reward_options,
            timeout_s=env.reward_timeout_s,
            batch_timeout_s=env.reward_batch_timeout_s,
        )

    def start(self) -> None:
        """Let the processes start, which takes seconds, while this one does something else."""
        # Starting waits for the server's import of torch.
        self._starter = threading.Thread(target=self._schedule, args=(_nothing, b"", self._timeout_s), daemon=True)
        self._starter.start()

    def close(self) -> None:
        """Kill the processes. Tasks that are under way are given up; a later task starts new processes."""
        self._started()
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = self._ready = None

    def submit(self, asks: Sequence[Ask]) -> list[PendingChunk]:
        """Ask parts of responses, in tasks of ``CHUNK`` responses; what was asked is told by each task in turn."""
        chunks = [asks[first : first + CHUNK] for first in range(0, len(asks), CHUNK)]
        return [PendingChunk(self, chunk) for chunk in chunks]

    def submit_batch(self, name: str, calls: Sequence[Call]) -> PendingBatch:
        """Ask a batched part of responses, in one task."""
        return PendingBatch(self, name, calls)

    # -- what the pending tasks ask -------------------------------------------------------------------------------

    def send(self, asks: Sequence[Ask]) -> Future[list[list[Outcome]] | None]:
        """Send a task: outcomes of each response, perhaps of the first ones only; None where images are needed."""
        strip = self._strip()
        light = [Ask(replace(each.call, sample=strip(each.call.sample)), each.parts) for each in asks]
        return self._schedule(_work, pickle.dumps((light, self._timeout_s)), self._timeout_s)

    def send_batch(self, name: str, calls: Sequence[Call]) -> Future[list[Outcome] | None]:
        """Send a task: outcomes of a batched part; None where images are needed."""
        strip = self._strip()
        light = [replace(call, sample=strip(call.sample)) for call in calls]
        return self._schedule(_work_batch, pickle.dumps((name, light)), self._batch_timeout_s)

    def wait(self, future: Future[Any]) -> Any:
        """Return what a task returned.

        Raises:
            _Lost: its process was killed, because time was up, or died, or the task could not be read.
            RuntimeError: the processes have not started in time.
        """
        self._wait_for_start()
        # Asked for, not raised by ``result``: a part's KeyboardInterrupt is no Ctrl-C of this process.
        try:
            error = future.exception()
        except CancelledError as cancelled:  # the pool was given up meanwhile
            error = cancelled
        if error is None:
            return future.result()
        if isinstance(error, TimeoutError):
            raise _Lost(f"had not returned after {error.args[-1]:g} s, its time limit, and was killed") from error
        if isinstance(error, ProcessExpired | BrokenProcessPool):
            code = f" with exit code {error.exitcode}" if isinstance(error, ProcessExpired) else ""
            raise _Lost(f"ended its worker process{code}") from error
        # What a part returned, or a registered exception, may not be picklable.
        raise _Lost(raised(error)) from error

    def need_images(self) -> None:
        """Send images from now on: a part looks at them."""
        self._sends_images = True

    def _strip(self) -> Callable[[Sample], Sample]:
        """Return a function that leaves images out; the same sample for the same, which is then pickled once."""
        stripped: dict[int, Sample] = {}

        def strip(sample: Sample) -> Sample:
            if self._sends_images or not sample.images:
                return sample
            if id(sample) not in stripped:
                stripped[id(sample)] = replace(sample, images=_Withheld(len(sample.images)))
            return stripped[id(sample)]

        return strip

    def _started(self) -> None:
        """Wait for what ``start`` began."""
        if self._starter is not None and self._starter is not threading.current_thread():
            self._starter.join()
            self._starter = None

    def _wait_for_start(self) -> None:
        """Wait until a process has started: before, no task has a time limit."""
        if self._ready is None:
            return
        try:
            self._ready.exception(START_LIMIT_S)
        except TimeoutError as error:
            self.close()
            raise RuntimeError(
                f"the reward workers had not started after {START_LIMIT_S:g} s: does a file of the recipe's imports "
                "hang when it is imported in another process? env.reward_workers: 0 runs parts in the trainer"
            ) from error

    def _schedule(self, function: Callable[[bytes], Any], payload: bytes, timeout_s: float) -> Future[Any]:
        self._started()
        try:
            if self._pool is not None:
                return self._pool.schedule(function, args=(payload,), timeout=timeout_s)
        except RuntimeError:  # a process died that had no task: pebble then gives up the pool
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._number,
                initializer=_begin,
                initargs=(self._imports, self._options),
                context=forkserver([__name__]),
            )
            self._ready = self._pool.schedule(_nothing, args=(b"",))
        return self._pool.schedule(function, args=(payload,), timeout=timeout_s)


class PendingChunk:
    """Responses that workers are asked about, all in one task.

    Args:
        workers: the pool that is asked.
        asks: what it is asked.
    """

    def __init__(self, workers: RewardWorkers, asks: Sequence[Ask]) -> None:
        self._workers, self._asks = workers, asks
        self._future = workers.send(asks)

    def results(self) -> Iterable[list[Outcome]]:
        """Wait, and yield the outcomes of each response: those of its parts, up to the first that failed."""
        done = 0
        try:
            while done < len(self._asks):
                got = self._workers.wait(self._future)
                if got is None:
                    self._workers.need_images()
                    got = []
                yield from got
                done += len(got)
                if done < len(self._asks):
                    self._future = self._workers.send(self._asks[done:])
        except _Lost:
            apart = [Ask(each.call, (name,)) for each in self._asks[done:] for name in each.parts]
            futures = [self._workers.send([each]) for each in apart]
            alone = (self._alone(each, future) for each, future in zip(apart, futures, strict=True))
            for each in self._asks[done:]:
                outcomes = [next(alone) for _ in each.parts]
                failures = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, float)]
                yield outcomes[: failures[0] + 1] if failures else outcomes

    def _alone(self, alone: Ask, future: Future[list[list[Outcome]] | None]) -> Outcome:
        (name,) = alone.parts
        try:
            got = self._workers.wait(future)
            if got is None:
                self._workers.need_images()
                got = self._workers.wait(self._workers.send([alone]))
        except _Lost as lost:
            return alone.call.failed(name, str(lost))
        return got[0][0]


class PendingBatch:
    """A batched part that a worker is asked about many responses, in one task.

    Args:
        workers: the pool that is asked.
        name: name of the part.
        calls: what it is asked.
    """

    def __init__(self, workers: RewardWorkers, name: str, calls: Sequence[Call]) -> None:
        self._workers, self._name, self._calls = workers, name, calls
        self._future = workers.send_batch(name, calls)

    def results(self) -> list[Outcome]:
        """Wait, and return the outcome of each response."""
        try:
            got = self._workers.wait(self._future)
            if got is None:
                self._workers.need_images()
                got = self._workers.wait(self._workers.send_batch(self._name, self._calls))
        except _Lost as lost:
            return failed_batch(self._name, self._calls, str(lost))
        return got


class _Lost(Exception):
    """A task did not come back; the message says why, the end of a sentence that begins with what was asked."""


# -- in a worker process -----------------------------------------------------------------------------------------


class _ImagesNeeded(BaseException):
    """A part looked at images that were not sent. No ``Exception``: a part may catch those."""


class _Withheld(Sequence[Any]):
    """Stands for the images of a sample where they were not sent; their number is known."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> NoReturn:
        raise _ImagesNeeded


_options: Options = {}


def _begin(imports: list[str], options: Options) -> None:
    """Prepare a worker process: a user's parts, their options, one thread, and an end with the training process."""
    _end_with_parent()
    torch.set_num_threads(1)
    import_all(imports, None)
    global _options
    _options = options


def _end_with_parent() -> None:
    """Let the kernel end this process when the training process ends, however it ends.

    A worker that waits for a task sees it; one that hangs in a call does not, nor would a thread where the call holds
    the interpreter's lock. So the pipe whose closing says it raises a signal, SIGIO, which ends a process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([parent.sentinel], timeout=0):  # it ended just now
        os._exit(1)


def _work(payload: bytes) -> list[list[Outcome]] | None:
    """Ask parts of responses in turn; those that are left when half of the time has passed are not asked."""
    asks, timeout_s = pickle.loads(payload)
    start = time.monotonic()
    results: list[list[Outcome]] = []
    try:
        for each in asks:
            if results and time.monotonic() - start > timeout_s / 2:
                break
            results.append(ask_in_turn(each, _options))
    except _ImagesNeeded:
        return None
    return results


def _work_batch(payload: bytes) -> list[Outcome] | None:
    name, calls = pickle.loads(payload)
    try:
        return ask_batch(name, calls, _options)
    except _ImagesNeeded:
        return None


def _nothing(payload: bytes) -> None:
    """Do nothing: a task that starts the processes."""
