# SPDX-License-Identifier: Apache-2.0
"""Forks ranks and programs from one process that has imported what they import, which takes each 8 s of a core.

It reads jobs from its standard input and answers each with a line, both JSON: see ``Job``. It never uses a collective
or a device itself: what is forked has no threads.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True, kw_only=True)
class Job:
    """A worker to run on ranks, or a program.

    Attributes:
        nproc: number of processes.
        module: dotted name of the worker's module, or of the program's.
        arguments: its command line.
        timeout: seconds after which all processes are killed.
        folder: where process N's output is written, to ``N.txt``.
        environment: variables of ranks, beside those of the server and those that torchrun sets for each; the whole
            environment of a program.
        is_program: whether it is no rank: its standard error is of its own, ``N.err``, and it ends with Python's
            shutdown, which ranks leave out.
    """

    nproc: int
    module: str
    arguments: Sequence[str]
    timeout: float
    folder: str
    environment: Mapping[str, str]
    is_program: bool = False

    def dumps(self) -> str:
        """Return the job as one line of text."""
        return json.dumps(asdict(self)) + "\n"


def run(job: Job) -> dict[int, int]:
    """Run the ranks to their end; when one fails the others are killed. Returns exit statuses by rank, -9 of those."""
    ranks = {_fork(job, rank): rank for rank in range(job.nproc)}
    statuses: dict[int, int] = {}
    end, killed = time.monotonic() + job.timeout, False
    while len(statuses) < job.nproc:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            statuses[ranks[pid]] = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.02)
        if not killed and (any(statuses.values()) or time.monotonic() > end):
            killed = True
            for child, rank in ranks.items():
                if rank not in statuses:
                    os.kill(child, signal.SIGKILL)
    return statuses


def _fork(job: Job, rank: int) -> int:
    child = os.fork()
    if not child:
        _begin(job, rank)
        if job.is_program:
            runpy.run_module(job.module, run_name="__main__", alter_sys=True)
            sys.exit(0)
        _be_rank(job)
    return child


def _begin(job: Job, rank: int) -> None:
    """Have the streams, the environment and the arguments of a process of its own."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    output = os.open(Path(job.folder) / f"{rank}.txt", flags)
    os.dup2(output, 1)
    os.dup2(os.open(Path(job.folder) / f"{rank}.err", flags) if job.is_program else output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [job.module, *job.arguments]
    if job.is_program:
        os.environ.clear()
        os.environ.update(job.environment)
    else:
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.nproc, "LOCAL_WORLD_SIZE": job.nproc}
        os.environ.update({**job.environment, **{name: str(value) for name, value in of_rank.items()}})


def _be_rank(job: Job) -> NoReturn:
    status = 1
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 (whatever it is, it is told, and ends this process)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import_what_workers_do() -> None:
    import megatron_g2rpo.cli  # first: it sets what torch reads as it is loaded
    import megatron_g2rpo.train.g2rpo  # noqa: F401
    import tests.common.parity
    import tests.common.tiny_model  # noqa: F401


def main() -> None:
    """Serve until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    _import_what_workers_do()
    gc.freeze()  # full collections of what is forked would walk through all that has been imported, and copy its pages
    for line in sys.stdin:
        answers.write(json.dumps(run(Job(**json.loads(line)))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
