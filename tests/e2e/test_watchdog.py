# SPDX-License-Identifier: Apache-2.0
"""Claims: of a job that hangs, or loses a rank, the message names the rank that is the cause, and the job ends soon.

Each fault is made for real: a reward that sleeps, a process that is stopped or killed. The limits are seconds here; the
runs are of two ranks, each of which waits for the other.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.toy import ROOT, Toy, metrics

LIMIT = 10.0  # cluster.watchdog_s: some beats, and longer than any part of these runs' work takes on a busy machine
# A reward part that sleeps for `seconds` at each response that rank 1 scores, from its `after`-th on.
SLEEPY = """
import os, time
from megatron_g2rpo.extend import reward_part

calls = 0

@reward_part("sleepy")
def sleepy(sample, response, *, seconds: float = 0.0, after: int = 0) -> float:
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls > after:
        time.sleep(seconds)
    return 1.0
"""


def recipe_of(toy: Toy, tmp_path: Path, *, seconds: float, after: int = 0, steps: int = 50) -> Path:
    rewards = tmp_path / "sleepy.py"
    rewards.write_text(SLEEPY)
    loop = {"max_num_steps": steps, "val_at_start": False, "val_at_end": False, "dynamic_sampling": {"enabled": False}}
    return toy.recipe(
        tmp_path / "recipe.yaml",
        imports=[str(rewards), str(ROOT / "examples" / "quickstart" / "rewards.py")],
        env={
            "reward_weights": {"_override_": True, "accuracy": 0.9, "sleepy": 0.1},
            "reward_workers": 0,  # in the rank: a worker that sleeps has a time limit of its own
            "reward_options": {"sleepy": {"seconds": seconds, "after": after}},
        },
        grpo=loop,
        checkpointing={"enabled": False, "export_hf": False},
        logger={"log_dir": str(tmp_path / "run")},
        cluster={"watchdog_s": LIMIT},
    )


@contextmanager
def started(*command: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A job in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # While the launcher lives: what it leaves behind is no longer known by its parent.
        for pid in [*ranks_of(process).values(), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def train(recipe: Path, *overrides: str) -> tuple[str | Path, ...]:
    return Path(sys.executable).with_name("megatron-g2rpo"), "train", recipe, "--nproc", "2", *overrides


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of a launcher's ranks."""
    found: dict[int, int] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        rank = [int(each[5:]) for each in environment if each.startswith(b"RANK=")]
        if rank and parent == process.pid:
            found[rank[0]] = pid
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lines_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_reward_that_sleeps_is_named_with_its_rank_and_line_and_all_stacks_are_written(
    toy: Toy, tmp_path: Path
) -> None:
    with started(*train(recipe_of(toy, tmp_path, seconds=3600.0, after=15))) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.startswith(f"error: no progress for {LIMIT:g} s (cluster.watchdog_s): rank 1 (host"), err
    assert re.search(r"step 2, phase rewards for \d+ s, at \S+sleepy.py:12 in sleepy\) hangs", err), err
    assert "rank 0 " not in err.split("\n")[0], "it waits for rank 1"
    stacks = {rank: (tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)}
    assert "sleepy.py" in stacks[1]
    assert "sleepy.py" not in stacks[0]
    assert "all_gather_object" in stacks[0]


@pytest.mark.full
def test_a_stopped_rank_is_named(toy: Toy, tmp_path: Path) -> None:
    with started(*train(recipe_of(toy, tmp_path, seconds=0.0))) as process:
        wait_for(lambda: lines_of(tmp_path / "run") >= 2, process)
        os.kill(ranks_of(process)[1], signal.SIGSTOP)
        # torchrun gives a process that does not end on SIGTERM 30 seconds.
        _, err = process.communicate(timeout=LIMIT * 2 + 30 + 30)
    assert process.returncode == 1
    assert re.search(r"\): rank 1 \(host .*: not heard of since; the process is stopped", err), err
    assert "rank 0 " not in err.split("\n")[0]
    assert (tmp_path / "run" / "stacks" / "rank_0.txt").exists()
    assert not (tmp_path / "run" / "stacks" / "rank_1.txt").exists()


@pytest.mark.full
def test_a_slow_rank_that_gets_on_is_not_ended(toy: Toy, tmp_path: Path) -> None:
    """12 responses a rank of 1.5 s each: rank 0 waits for almost twice the limit."""
    with started(*train(recipe_of(toy, tmp_path, seconds=1.5, steps=1))) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert metrics(tmp_path / "run")[1]["time/rewards"] > 1.5 * LIMIT
    assert not (tmp_path / "run" / "stacks").exists()


@pytest.mark.full
def test_a_killed_rank_is_named_with_host_and_step(toy: Toy, tmp_path: Path) -> None:
    with started(*train(recipe_of(toy, tmp_path, seconds=0.0))) as process:
        wait_for(lambda: lines_of(tmp_path / "run") >= 2, process)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    step = lines_of(tmp_path / "run") + 1
    found = re.match(
        rf"error: rank 1 \(on {re.escape(socket.gethostname())}, step (\d+), phase \w+\) ended without a message "
        r"\(Signal 9 \(SIGKILL\)",
        err,
    )
    assert found, err
    assert int(found[1]) in (step - 1, step), "rank 0 may not have logged the step that rank 1 had finished"


@pytest.mark.full
def test_the_other_node_names_the_rank_that_died(toy: Toy, tmp_path: Path) -> None:
    """Two launchers stand for two nodes; the second's rank is killed, the first must say so, not what gloo says."""
    recipe = recipe_of(toy, tmp_path, seconds=0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(number: int) -> tuple[str | Path, ...]:
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
        where = (f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}")
        return *torchrun, *where, "-m", "megatron_g2rpo.cli", "train", recipe

    with started(*node(0)) as first, started(*node(1)) as second:
        wait_for(lambda: lines_of(tmp_path / "run") >= 2, first)
        os.kill(ranks_of(second)[1], signal.SIGKILL)
        _, err = first.communicate(timeout=60)
        second.communicate(timeout=60)
    assert first.returncode == 1
    assert second.returncode == 1
    ours = err[err.index("error: ") :]
    assert re.match(r"error: rank 0: rank 1 \(host .*; step \d+, phase \w+.*\) has ended without a message", ours), err
    assert "Traceback" not in ours.split("what this rank saw")[0]
