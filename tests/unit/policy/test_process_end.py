# SPDX-License-Identifier: Apache-2.0
"""A process that has joined a process group ends in order, without a word to say so."""

from __future__ import annotations

import subprocess
import sys

# What is registered first is called last: after the group's own.
SCRIPT = """
import atexit
import torch
import torch.distributed as dist

atexit.register(lambda: print("initialized at the end:", dist.is_initialized()))
from megatron_g2rpo.policy.device import init_process_group, select

for repetition in range(2):
    init_process_group(select("cpu"))
    {between}
for _ in range(300):  # under way as the interpreter ends; 3 of 41 runs aborted
    dist.all_reduce(torch.ones(100_000), async_op=True)
"""


def test_the_threads_of_a_group_end_before_the_interpreter() -> None:
    assert _run("") == "initialized at the end: False\n"


def test_a_group_may_be_left_and_joined_again() -> None:
    assert _run("dist.destroy_process_group() if repetition == 0 else None") == "initialized at the end: False\n"


def _run(between: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(between=between)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
