# SPDX-License-Identifier: Apache-2.0
"""How a job is told to stop, and what becomes of it: real signals through the real scripts, a stand-in for the trainer.

The stand-in says what it was started with, waits for SIGUSR2, and leaves with the code of the test.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import JOB, RECIPE, ROOT, Stubs

TRAINER = """
import os, signal, subprocess, sys, time
helper = subprocess.Popen(["sleep", "60"])
def leave(number, frame):
    print("told by", signal.Signals(number).name, "helper", "alive" if helper.poll() is None else "dead", flush=True)
    helper.kill()
    os._exit(int(os.environ["CODE"]))
signal.signal(signal.SIGUSR2, leave)
launcher = f"{os.getppid()}@{os.readlink('/proc/self/ns/pid')}"
assert os.environ["MEGATRON_G2RPO_LAUNCHER"] == launcher, "by which the trainer knows that it has lost rank.sh"
print(*(os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")), flush=True)
time.sleep(60)
"""
# Two nodes of two tasks, on this machine; like Slurm's, the first task that fails ends the others, after a while in
# which they may end by themselves, and the step.
SRUN = r"""
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2
pids=()
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURMD_NODENAME=gpu0$((7 + task / 2)) setsid "$@" & pids+=($!)
done
echo "${pids[@]}" > "$RECORDS/pids"
for _ in "${pids[@]}"; do
  wait -n; code=$?
  [ $code = 0 ] || break
done
if [ $code != 0 ]; then
  sleep 2
  for pid in "${pids[@]}"; do kill -KILL -- -"$pid" 2>/dev/null; done
fi
exit $code
"""
# As Slurm does: to every process of the step.
SCANCEL = """echo "$*" >> "$RECORDS/scancel"; for pid in $(cat "$RECORDS/pids"); do kill -URG -- -"$pid"; done"""
# Requeueing ends the batch script.
SCONTROL = r"""case $1 in
  show) printf 'gpu07\ngpu08\n' ;;
  requeue) echo "$2" >> "$RECORDS/requeued"; kill -TERM $PPID ;;
esac"""


class Job:
    """A batch script at work, up to the moment when all four ranks have begun."""

    def __init__(self, stubs: Stubs, tmp_path: Path, code: int, state: str = "RUNNING", **variables: str) -> None:
        trainer, python = tmp_path / "trainer.py", tmp_path / "python"
        trainer.write_text(TRAINER)
        python.write_text(f'#!/usr/bin/env bash\n[ "$1" = - ] || set -- "{trainer}"\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        for name, body in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": f"echo {state}"}.items():
            stubs.write(name, body)
        self.tmp_path, self.logs = tmp_path, tmp_path / "slurm-g2rpo-123456"
        given = {**JOB, "SLURM_GPUS_ON_NODE": "2", "LOGS": str(tmp_path), "RECORDS": str(tmp_path), "CODE": str(code)}
        self.process = subprocess.Popen(
            # The recipe's own run directory may hold a finished run, after which a chain has nothing to do.
            ["bash", "slurm/train_g2rpo.sh", RECIPE, f"logger.log_dir={tmp_path}/run"],
            cwd=ROOT,
            env=stubs.environment(**{**given, "PYTHON": str(python), **variables}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._until(lambda: all(self.log(rank) for rank in range(4)))

    def _until(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def log(self, rank: int) -> str:
        path = self.logs / f"rank_{rank}.log"
        return path.read_text() if path.exists() else ""

    def ended(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    @property
    def requeued(self) -> bool:
        return (self.tmp_path / "requeued").exists()


def test_a_stopped_run_is_requeued(stubs: Stubs, tmp_path: Path) -> None:
    """The signal reaches the trainers alone, not what they have started; every rank has a log and its place."""
    job = Job(stubs, tmp_path, code=75)
    job.process.send_signal(signal.SIGUSR1)
    _, said = job.ended()
    assert job.requeued, said
    for rank in range(4):
        assert job.log(rank) == f"{rank} 4 {rank % 2} 2\ntold by SIGUSR2 helper alive\n"
    assert (tmp_path / "scancel").read_text() == "--quiet --signal=URG 123456\n"


@pytest.mark.parametrize(
    ("code", "state", "variables", "ends", "says"),
    [
        (0, "RUNNING", {}, 0, "asked to stop"),
        (3, "RUNNING", {}, 3, "rank 0 on gpu07 ended with code 3"),
        (75, "CANCELLED", {}, 75, "the job is CANCELLED, so it is not requeued"),
        (75, "RUNNING", {"REQUEUE": "0"}, 75, "the same command goes on (REQUEUE=0)"),
        (75, "RUNNING", {"CHAIN": "3", "CHAIN_LINK": "2"}, 0, "the next job of the chain goes on"),
        (75, "RUNNING", {"CHAIN": "3", "CHAIN_LINK": "3"}, 75, "the same command goes on"),
    ],
)
def test_what_is_not_requeued(
    stubs: Stubs, tmp_path: Path, code: int, state: str, variables: dict[str, str], ends: int, says: str
) -> None:
    """A run that ends or fails as it is told to stop, a cancelled job, and where the user wants none."""
    job = Job(stubs, tmp_path, code, state, **variables)
    job.process.send_signal(signal.SIGTERM)
    returned, said = job.ended()
    assert (returned, job.requeued) == (ends, False), said
    assert says in said


def test_a_killed_rank_is_named(stubs: Stubs, tmp_path: Path) -> None:
    job = Job(stubs, tmp_path, code=75)
    leader = int((tmp_path / "pids").read_text().split()[2])
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    trainer = next(pid for pid in children if b"trainer.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    subprocess.run(["kill", "-KILL", trainer], check=True)
    returned, said = job.ended()
    assert (returned, job.requeued) == (137, False)
    assert "rank 2 on gpu08 was ended by signal 9" in said
