# SPDX-License-Identifier: Apache-2.0
"""Launching a worker script on several processes, the way users do: torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(nproc: int, *arguments: str, timeout: int = 300) -> str:
    """Run ``python ARGUMENTS`` on ``nproc`` ranks; its output. Fails the test with that output if a rank fails.

    Args:
        nproc: number of processes.
        arguments: ``-m module`` or a script, then its arguments.
        timeout: seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{output[-20000:]}"
    return output
