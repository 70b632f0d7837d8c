# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line that are interrupted from outside, and how what they leave is compared."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.toy import ROOT, metrics, numbers

START_LIMIT_S, END_LIMIT_S = 180.0, 120.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """A run that has been started, in a session of its own.

    Attributes:
        process: the run, or the launcher of its ranks.
        run: its run directory.
        log: what it prints.
        nproc: its number of ranks.
        started: when, seconds since the epoch.
    """

    process: subprocess.Popen[bytes]
    run: Path
    log: Path
    nproc: int
    started: float

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        if self.nproc == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = [int(pid) for pid in children if b"megatron_g2rpo.cli" in _command(int(pid))]
        assert len(named) <= self.nproc
        return named

    def await_step(self, step: int) -> bool:
        """Wait until this job, not one before it, has logged a step; whether it has, and did not end before."""
        file = self.run / "metrics.jsonl"
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                return False
            with contextlib.suppress(FileNotFoundError):
                lines = file.read_text().splitlines()
                if file.stat().st_mtime > self.started and len(lines) > step:
                    return True
            time.sleep(0.02)
        raise AssertionError(f"step {step} did not come:\n{self.output()}")

    def send(self, number: int, pids: Sequence[int]) -> None:
        """Send a signal to processes; one may have ended."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> int:
        """Wait for the end of the launcher; its exit code. No rank may be left."""
        ranks = [] if self.process.poll() is not None else self.ranks()
        try:
            code = self.process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.output()}") from None
        limit = time.monotonic() + 10.0
        while any(_command(pid) for pid in ranks):
            assert time.monotonic() < limit, f"ranks are left of {ranks}"
            time.sleep(0.05)
        return code

    def output(self) -> str:
        """What it has printed, the end of it."""
        return self.log.read_text()[-6000:]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@contextlib.contextmanager
def started(recipe: Path, run: Path, nproc: int, *overrides: str, verb: str = "train") -> Iterator[Job]:
    """Start a run, and kill what is left of it when the test ends."""
    script = Path(sys.executable).with_name("megatron-g2rpo")
    log, now = run.with_name(f"{run.name}.log"), time.time()
    command = [str(script), verb, str(recipe), "--nproc", str(nproc), f"logger.log_dir={run}", *overrides]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Tests that run in the background of a shell are started with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    job = Job(process, run, log, nproc, now)
    try:
        yield job
    finally:
        if process.poll() is None:
            job.send(signal.SIGKILL, [*job.ranks(), process.pid])
            process.wait()


Interrupt = Callable[[Job, random.Random], None]


def kill_one(job: Job, chance: random.Random) -> None:
    """SIGKILL one rank; the others have to end, and the launcher with an error."""
    ranks = job.ranks()
    if ranks:
        job.send(signal.SIGKILL, [chance.choice(ranks)])
        assert job.end() == (1 if job.nproc > 1 else -signal.SIGKILL), job.output()


def kill_all(job: Job, chance: random.Random) -> None:
    """SIGKILL all ranks at once."""
    ranks = job.ranks()
    if ranks:
        job.send(signal.SIGKILL, ranks)
        assert job.end() == (1 if job.nproc > 1 else -signal.SIGKILL), job.output()


def ask(job: Job, chance: random.Random) -> None:
    """Ask to stop: by any of the signals, through the launcher, one rank or all processes."""
    number = chance.choice(STOP_SIGNALS)
    ranks = job.ranks()
    if ranks:
        everyone = [job.process.pid, *ranks]
        whom = chance.choice(([job.process.pid], [chance.choice(ranks)], everyone))
        job.send(number, list(dict.fromkeys(whom)))
        code = job.end()
        # It had come to its end when it was asked, or has more to do.
        done = code == 0 and "Hugging Face checkpoint" in job.output()
        assert code == 75 or done, f"{signal.Signals(number).name} to {whom}: {code}\n{job.output()}"


def interrupted_at(
    recipe: Path,
    run: Path,
    nproc: int,
    overrides: Sequence[str],
    interrupt: Interrupt,
    *,
    steps: int,
    points: int,
    seed: int,
) -> None:
    """Run to the end, interrupted at random points of the run: some time after a random step was logged.

    Args:
        recipe, run, nproc, overrides: the run.
        interrupt: what is done to it.
        steps: number of its steps.
        points: how often it is interrupted.
        seed: of the points, which are printed.
    """
    chance = random.Random(seed)
    at = sorted(chance.uniform(0.0, steps) for _ in range(points))
    print(f"{interrupt.__name__}, {nproc} ranks, seed {seed}: after steps {[round(point, 2) for point in at]}")
    for point in at:
        with started(recipe, run, nproc, *overrides) as job:
            if job.await_step(int(point)):
                time.sleep((point - int(point)) * 2.0)  # a step takes about a second
                interrupt(job, chance)
    with started(recipe, run, nproc, *overrides) as job:
        assert job.end() == 0, job.output()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every event that TensorBoard would show, in the order of the files; without seconds."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "memory/", "speed/"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that two runs left the same metrics, events and weights, bit for bit, and no step twice.

    Args:
        run, expected: their directories.
    """
    lines, others = metrics(run), metrics(expected)
    assert list(lines) == list(others)
    for step, line in lines.items():
        mine, theirs = numbers(line), numbers(others[step])
        assert mine == theirs, {name: (step, mine.get(name), theirs.get(name)) for name in mine.keys() | theirs.keys()}
    assert (run / "hf" / "model.safetensors").read_bytes() == (expected / "hf" / "model.safetensors").read_bytes()
    assert scalars(run) == scalars(expected)
