# SPDX-License-Identifier: Apache-2.0
"""Launching a worker on several processes, the way users do (torchrun), and hearing from every rank what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
    # What is there stays: a virtual GPU is started from a folder on it.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{output[-20000:]}"
    return output


def torchrun_json(nproc: int, module: str, *arguments: str, timeout: int = 300, **environment: str) -> list[Any]:
    """Run a worker on ``nproc`` ranks, and return what each rank passed to ``report_result``, in the order of ranks.

    Fails the test if a rank fails, or ends without a report.

    Args:
        nproc: number of processes.
        module: dotted name of the worker's module.
        arguments: command-line arguments of the worker.
        timeout: seconds after which the test fails.
        environment: further environment variables.
    """
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        output = torchrun(nproc, "-m", module, *arguments, timeout=timeout, **{RESULTS: folder}, **environment)
        files = [Path(folder) / f"{rank}.json" for rank in range(nproc)]
        silent = [rank for rank, file in enumerate(files) if not file.exists()]
        assert not silent, f"{module}: ranks {silent} reported nothing:\n{output[-20000:]}"
        return [json.loads(file.read_text()) for file in files]


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
