# SPDX-License-Identifier: Apache-2.0
"""torchrun whose ranks may take their time to stop, and whose exit code says that they did.

    python -m megatron_g2rpo.commands.torchrun [torchrun's own arguments] -m megatron_g2rpo.cli train RECIPE

What torchrun does with a signal is not what a run needs: it passes SIGTERM to every process of its ranks, the workers
and engines of a rank too, kills what is left 30 seconds later, does not know SIGUSR1, and ends with 1 whatever its
ranks ended with. Here

- the first signal asks the ranks to stop, and they are waited for; the second kills them at once;
- when they have stopped, the launchers of all nodes wait for each other and exit with 75;
- when a rank fails, the other ones of its node, which could only wait for it, are killed at once, and only those that
  failed by themselves are reported;
- ranks are told which process launches them, and end when it does (``processes.launcher``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.launcher import api

from megatron_g2rpo.processes import launcher
from megatron_g2rpo.train.run import signals
from megatron_g2rpo.train.run.signals import FORWARDED, STOPPED, Repeats, SignalWatch


class Ranks:
    """The ranks of this machine, as their launcher sees them.

    Attributes:
        failed: local ranks that failed, and were not killed because another one had.
        stopped: whether they ended because they were asked to.
    """

    def __init__(self) -> None:
        self.failed: set[int] = set()
        self.stopped = False
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._asked = False
        self._repeats = Repeats()

    def started(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        """Take note of the processes, and pass on what was asked before they were there."""
        self._processes = processes
        if self._asked:
            self._send(FORWARDED)

    def received(self, number: int) -> None:
        """Pass a signal on: the first as a request, the second as the end."""
        if number != FORWARDED and self._repeats.is_second(number):
            self._send(signal.SIGKILL)
            os._exit(128 + number)
        self._asked = True
        self._send(FORWARDED)

    def one_ended(self) -> None:
        """Decide what the end of a rank means for the others: wait for them if it stopped, kill them if it failed."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        if STOPPED in codes.values() or (self._asked and -FORWARDED in codes.values()):  # asked while Python started
            self.stopped = True
            return
        self.failed = {rank for rank, code in codes.items() if code}
        if self.failed:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        # To the rank alone: its workers see that it ends, and are none of the run's processes that save.
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    os.kill(process.pid, number)


class _Agent(LocalElasticAgent):
    """torchrun's agent of one machine.

    Args:
        ranks: told of the processes, and of their ends.
    """

    def __init__(self, *args: Any, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = ranks

    # torchrun's decorator of these two has no types.
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        pids: Any = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        close = context.close

        def close_after(*args: Any, **kwargs: Any) -> None:
            self._ranks.one_ended()
            close(*args, **kwargs)

        context.close = close_after
        self._ranks.started({rank: handler.proc for rank, handler in context.subprocess_handlers.items()})
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        result: Any = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.state != WorkerState.FAILED:
            return result
        if self._ranks.stopped:  # as a success, after which the agents of all nodes wait for each other
            values = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        own = {worker_group.workers[rank].global_rank for rank in self._ranks.failed}
        failures = {rank: failure for rank, failure in result.failures.items() if rank in own}
        return RunResult(state=result.state, failures=failures or result.failures)


def run(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments, in this process; a signal asks its ranks to stop.

    Returns:
        The exit code: 0, or 75 if the ranks were stopped.

    Raises:
        ChildFailedError: a rank failed.
    """
    ranks = Ranks()
    with _agent_of(ranks), SignalWatch(ranks.received):
        try:
            run_plainly(["--signals-to-handle=SIGQUIT", *arguments])
        finally:
            signals.current().done()  # a launcher's own
    return STOPPED if ranks.stopped else 0


def run_plainly(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments, in this process; a signal ends its ranks.

    Returns:
        The exit code, 0.

    Raises:
        ChildFailedError: a rank failed.
        SignalException: torchrun was sent a signal.
    """
    from torch.distributed.run import main

    with launcher.announced():
        main(list(arguments))
    return 0


@contextlib.contextmanager
def _agent_of(ranks: Ranks) -> Iterator[None]:
    """Let torchrun, which names the class of its agent, build ours."""
    before = api.LocalElasticAgent
    api.LocalElasticAgent = functools.partial(_Agent, ranks=ranks)  # type: ignore[assignment]
    try:
        yield
    finally:
        api.LocalElasticAgent = before


def main() -> int:
    """Run torchrun as the program of this process; its exit code."""
    signals.for_good()
    with signals.watched():
        return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
