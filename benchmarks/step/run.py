# SPDX-License-Identifier: Apache-2.0
"""Measure the whole step (process, generate, score, update) of this project beside TRL's and a plain-torch floor.

    make bench-step                                         everything: an hour on a quiet machine
    python -m benchmarks.step.run --quick                   size (i) alone, two steps a side: a few minutes
    python -m benchmarks.step.run --only ii --sides ours floor

Every side is a process of its own, with one thread and the same allocator, and the processes take turns step by step.
What is measured is the processor's time of the process. Results are appended to ``runs/bench-step/results.jsonl``:
steps that are there are not taken again, so that a run that was broken off goes on. ``report.md`` beside it is made
from that file alone.

All sides: float32, no gradient checkpointing, one update a step, AdamW, every image encoded, every answer of its full
length, gradients to every parameter. TRL's batch is one micro-batch, and in another form one a prompt: the report has
a ratio for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.step import report, workload
from benchmarks.step.sizes import BY_NAME, SIDES, Job, Size, jobs

DIRECTORY = Path("runs/bench-step")


class SideFailed(RuntimeError):
    """A side's process ended, or did other work than was asked for."""


class SideProcess:
    """One side of one size, in a process that takes a step when it is told to."""

    def __init__(self, side: str, size: Size, directory: Path, threads: int) -> None:
        self.side, self.size = side, size
        self._log = directory / f"{side}-{size.name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # Large tensors from the heap, which keeps its pages: what fresh pages cost is the kernel's, not a side's.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "benchmarks.step.side", side, size.name, str(directory)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def step(self) -> dict[str, Any]:
        """Take a step; returns its record.

        Raises:
            SideFailed: the process ended, or the step's work is not that of the size.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print("step", file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideFailed(f"{self.side} at {self.size.name} ended with {self._process.wait()}: see {self._log}")
        record = json.loads(line)
        check_work(record, self.side, self.size)
        return record

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check_work(record: dict[str, Any], side: str, size: Size) -> None:
    """Check that a step did all that the size asks for, with gradients to every parameter.

    Raises:
        SideFailed: it did other work.
    """
    wanted = {
        "rollouts": size.rollouts,
        "prompt_tokens": size.prompts * size.prompt_tokens,
        "answer_tokens": size.rollouts * size.answer_tokens,
        "updates": 1,
        "images": size.prompts,
    }
    if record["work"] != wanted:
        raise SideFailed(f"{side} at {size.name} did {record['work']}, not {wanted}")
    if record["untrained"]:
        raise SideFailed(f"{side} at {size.name} has no gradient for {', '.join(record['untrained'])}")


class Results:
    """The file of results: a line a step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = report.read(path)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, job: Job, side: str, threads: int) -> list[dict[str, Any]]:
        """Return the counted steps of a side."""
        return [
            record
            for record in self.records
            if (record["size"], record["side"], record["threads"]) == (job.size.name, side, threads)
            and not record["warm_up"]
        ]


def take_turns(job: Job, results: Results, directory: Path, threads: int) -> None:
    """Take the missing steps of a job, the sides in turn."""
    missing = {side: job.steps - len(results.of(job, side, threads)) for side in job.sides}
    missing = {side: count for side, count in missing.items() if count > 0}
    processes: dict[str, SideProcess] = {}
    try:
        for side in missing:
            processes[side] = SideProcess(side, job.size, directory, threads)
        for number in range(job.warm_up + max(missing.values(), default=0)):
            for side, count in missing.items():
                if number < job.warm_up + count:
                    record = processes[side].step()
                    results.add(
                        {
                            "size": job.size.name,
                            "side": side,
                            "threads": threads,
                            "warm_up": number < job.warm_up,
                            "load": os.getloadavg()[0],
                            "torch": torch.__version__,
                            **record,
                        }
                    )
                    _say(job, results, side, threads, record, warm_up=number < job.warm_up)
    finally:
        for process in processes.values():
            process.close()


def _say(job: Job, results: Results, side: str, threads: int, record: dict[str, Any], *, warm_up: bool) -> None:
    counted = [each["cpu"] for each in results.of(job, side, threads)]
    middle = "warm-up" if warm_up or not counted else f"median {median(counted):8.3f} of {len(counted)}"
    print(f"{job.size.name:12} {side:14} {record['cpu']:8.3f} s  {middle}", flush=True)


def run(chosen: Iterable[Job], directory: Path, threads: int, *, write: Callable[[Path], None]) -> None:
    """Take what is missing of the jobs' steps, and write the report after each job."""
    directory.mkdir(parents=True, exist_ok=True)
    workload.build(directory)
    results = Results(directory / "results.jsonl")
    for job in chosen:
        workload.write_shards(job.size, directory)
        take_turns(job, results, directory, threads)
        write(directory)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="size (i) alone, two steps a side")
    parser.add_argument("--only", nargs="+", choices=sorted(BY_NAME), help="these sizes alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="these sides alone")
    parser.add_argument("--steps", type=int, help="measured steps a side, in place of each size's own number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    arguments = parser.parse_args()
    chosen = [
        Job(
            size=job.size,
            sides=tuple(side for side in job.sides if side in arguments.sides),
            steps=arguments.steps or job.steps,
            warm_up=job.warm_up,
        )
        for job in jobs(quick=arguments.quick)
        if arguments.only is None or job.size.name in arguments.only
    ]
    run(chosen, arguments.directory, arguments.threads, write=report.write)
    print(arguments.directory / "report.md")


if __name__ == "__main__":
    main()
