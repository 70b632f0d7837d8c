# SPDX-License-Identifier: Apache-2.0
"""Launching a worker on several processes, and hearing from every rank what it found; running a program.

``torchrun`` starts processes the way users do. ``torchrun_json``, ``ranks`` and ``program`` fork them from a process
that has imported what they need, with what torchrun or a shell would tell them, wherever no real GPU may be touched by
an import before the fork.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.common.rank_server import Job

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "G2RPO_TEST_RESULTS"  # environment variable: the folder that ranks report to


def torchrun(nproc: int, *arguments: str, timeout: int = 300, **environment: str) -> str:
    """Run ``python ARGUMENTS`` on ``nproc`` ranks and return its output; fail the test with it if a rank fails.

    Args:
        nproc: number of processes.
        arguments: ``-m module`` or a script, then its arguments.
        timeout: seconds after which the test fails.
        environment: further environment variables.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{output[-20000:]}"
    return output


def _environment() -> dict[str, str]:
    # What is there stays: a virtual GPU is started from a folder on it.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def torchrun_json(nproc: int, module: str, *arguments: str, timeout: int = 300, **environment: str) -> list[Any]:
    """Run a worker on ``nproc`` ranks, and return what each rank passed to ``report_result``, in the order of ranks.

    Fails the test if a rank fails, or ends without a report.

    Args:
        nproc: number of processes.
        module: dotted name of the worker's module.
        arguments: command-line arguments of the worker.
        timeout: seconds after which the test fails.
        environment: further environment variables, which a library may read as it is imported.
    """
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        if environment or not can_fork():
            output = torchrun(nproc, "-m", module, *arguments, timeout=timeout, **{RESULTS: folder}, **environment)
        else:
            output = _fork(nproc, module, arguments, timeout, folder, {RESULTS: folder})
        files = [Path(folder) / f"{rank}.json" for rank in range(nproc)]
        silent = [rank for rank, file in enumerate(files) if not file.exists()]
        assert not silent, f"{module}: ranks {silent} reported nothing:\n{output[-20000:]}"
        return [json.loads(file.read_text()) for file in files]


def ranks(nproc: int, module: str, *arguments: str, timeout: int = 300, **environment: str) -> str:
    """Run ``python -m MODULE ARGUMENTS`` on ``nproc`` ranks, forked where that can be, and return what all printed.

    Fails the test if a rank fails. What a rank's process leaves to Python's shutdown is not run.

    Args:
        nproc: number of processes.
        module: dotted name of a module that needs no more than torchrun's environment to be a rank.
        arguments: its command line.
        timeout: seconds after which the test fails.
        environment: further environment variables. Those that a library reads as it is imported may come too late.
    """
    if not can_fork():
        return torchrun(nproc, "-m", module, *arguments, timeout=timeout, **environment)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        return _fork(nproc, module, arguments, timeout, folder, environment)


def can_fork() -> bool:
    """Whether processes may be forked after their imports: a real GPU that one of these touched would not bear it."""
    return "VIRTUAL_CUDA" in os.environ or not torch.cuda.is_available()


def program(module: str, *arguments: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` from the repository, forked where that can be.

    Args:
        module: dotted name of a module, or of a package with a ``__main__``.
        arguments: its command line.
        timeout: seconds after which it is killed.
        environment: further environment variables. Those that a library reads as it is imported may come too late.
    """
    variables = {**os.environ, **environment}
    if not can_fork():
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        job = Job(
            nproc=1,
            module=module,
            arguments=arguments,
            timeout=timeout,
            folder=folder,
            environment=variables,
            is_program=True,
        )
        status = _answer(job)["0"]
        out, err = (Path(folder, f"0.{kind}").read_text() for kind in ("txt", "err"))
        return subprocess.CompletedProcess([module, *arguments], status, out, err)


def _fork(
    nproc: int, module: str, arguments: tuple[str, ...], timeout: int, folder: str, variables: Mapping[str, str]
) -> str:
    # As torchrun does, its store outside of the ranks: none of them can take it away from the others.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": module,
        **variables,
    }
    job = Job(nproc=nproc, module=module, arguments=arguments, timeout=timeout, folder=folder, environment=environment)
    statuses = _answer(job)
    output = "".join(f"[rank {rank}]\n{Path(folder, f'{rank}.txt').read_text()}" for rank in range(nproc))
    failed = {rank: status for rank, status in sorted(statuses.items()) if status != 0}
    assert not failed, f"{module} {' '.join(arguments)}: exit statuses by rank {failed}:\n{output[-20000:]}"
    return output


def _answer(job: Job) -> dict[str, int]:
    """Exit statuses by rank."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(job.dumps())
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that forks ranks has ended with {server.wait()}"
    return json.loads(answer)


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.common.rank_server"]
    server = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    return server


def report_result(result: Any) -> None:
    """Pass this rank's result to ``torchrun_json``, or print it in other runs. A worker calls it once, at its end.

    It ends the process group: an interpreter that ends while gloo's threads run aborts now and then.

    Args:
        result: a value that JSON can hold, or that contains nan and infinity.
    """
    text = json.dumps(result)
    if RESULTS not in os.environ:
        print(text, flush=True)
    else:
        file = Path(os.environ[RESULTS]) / f"{os.environ['RANK']}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(text)
        partial.rename(file)
    if dist.is_initialized():
        dist.barrier()  # a peer may still read from this rank
        dist.destroy_process_group()
