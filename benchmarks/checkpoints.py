# SPDX-License-Identifier: Apache-2.0
"""What saving takes of a run's time: no checkpoint, a synchronous one and an asynchronous one, each every step.

A step is an optimizer step of a small random policy on a batch that grows until the step takes about ``--step-s``
seconds. The three arms take turns within one process, so that a machine that does other work disturbs all alike. "Held
up" is the time in which no step can be taken: for the synchronous arm all of the save, for the asynchronous one the
copy, and what is left to write when the next save begins. What sharing the processor with the writing thread costs is
in the steps themselves, and so in the share.

    python benchmarks/checkpoints.py [--hidden 1024] [--layers 8] [--steps 6] [--rounds 3] [--step-s 4]
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.weights.manifest import FileRecord
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

ARMS = ("none", "synchronous", "asynchronous")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="a round of an arm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=4.0, help="seconds of a step, about")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run the three arms in turn in a folder, and print the table."""
    model = folder / "model"
    make_tiny_qwen3vl(
        model,
        layers=options.layers,
        vision_depth=2,
        deepstack=(0,),
        hidden=options.hidden,
        intermediate=4 * options.hidden,
    )
    policy = MegatronPolicy(layout_options(model), select("cpu"), seed=0, max_steps=10_000)
    rows = packer_for(policy.hf_config).pack(random_sequences(policy.hf_config), budget=80)

    def step(repeats: int) -> float:
        start = time.perf_counter()
        policy.update(rows * repeats, toy_loss)
        return time.perf_counter() - start

    step(1)
    repeats = max(1, round(options.step_s / step(1)))
    step_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
    held_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
    total_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(options.rounds):
        for arm in ARMS[number % 3 :] + ARMS[: number % 3]:
            checkpoints = Checkpoints(folder / arm, Retention(1), is_async=arm == "asynchronous")
            begin = time.perf_counter()
            for index in range(options.steps):
                step_s[arm].append(step(repeats))
                start = time.perf_counter()
                if arm != "none":
                    checkpoints.poll()
                    checkpoints.save(number * options.steps + index, policy, {})
                held_s[arm].append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints.finish()  # the last one has no step to hide behind
            held_s[arm][-1] += time.perf_counter() - start
            total_s[arm].append((time.perf_counter() - begin) / options.steps)
    newest = next((folder / "synchronous").iterdir())
    nbytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    report(nbytes, repeats, step_s, held_s, total_s)
    largest = max(newest.rglob("*.distcp"), key=lambda file: file.stat().st_size)
    start = time.perf_counter()
    FileRecord.of(largest)
    seconds = time.perf_counter() - start
    print(f"{hashlib.sha256().name} of a file in the page cache: {largest.stat().st_size / seconds / 1e9:.2f} GB/s")


def report(
    nbytes: int,
    repeats: int,
    step_s: dict[str, list[float]],
    held_s: dict[str, list[float]],
    total_s: dict[str, list[float]],
) -> None:
    """Print medians and ranges by arm."""
    table = Table(title=f"{nbytes / 1e9:.2f} GB a checkpoint, one a step; {repeats} micro-batches a step")
    for heading in ("checkpoints", "step, s", "held up, s", "step and save, s", "share of saving"):
        table.add_column(heading, justify="right")
    alone = statistics.median(total_s["none"])
    for arm in ARMS:
        total = statistics.median(total_s[arm])
        table.add_row(
            arm,
            _spread(step_s[arm]),
            _spread(held_s[arm]) if arm != "none" else "-",
            _spread(total_s[arm]),
            f"{1 - alone / total:.1%}" if arm != "none" else "-",
        )
    Console(width=120).print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
