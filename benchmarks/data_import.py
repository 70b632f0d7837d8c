# SPDX-License-Identifier: Apache-2.0
"""Throughput of ``data import`` beside a plain ``tar`` of the same files.

    python benchmarks/data_import.py [--samples 50000] [--side 64] [--workers 1 2] [--dir SCRATCH]

Writes JSON lines and one JPEG of ``side`` x ``side`` pixels of noise a sample, in folders of 1,000, to a scratch
directory that is removed at the end. Then runs, each as a process of its own: ``tar`` of lines and images; the import
at each number of processes, with and without decoding the images; an import into two parts (``--split``); and ``tar``
again. Before each, everything written so far is on the disk; all read from the page cache. "Processor" is user and
system time of the first process of an arm, without that of the processes that read, which other jobs of the machine
disturb less than the wall clock. Memory is the resident peak of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Make the files, run every arm once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dir", type=Path, default=None, help="where the scratch directory is made")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        source = scratch / "source"
        size = make(source, arguments.samples, arguments.side)
        print(f"{arguments.samples} samples, {size / 1e6:.1f} MB of images and lines")
        print(f"{'arm':<40} {'wall s':>7} {'processor s':>12} {'samples/s':>10} {'MB/s':>7} {'peak MB':>8}")
        for name, command in arms(source, scratch, arguments.workers).items():
            os.sync()
            seconds, processor, peak = timed(command)
            rates = f"{arguments.samples / seconds:>10.0f} {size / 1e6 / seconds:>7.1f}"
            print(f"{name:<40} {seconds:>7.1f} {processor:>12.1f} {rates} {peak / 1e6:>8.0f}", flush=True)
    finally:
        shutil.rmtree(scratch)


def make(folder: Path, samples: int, side: int) -> int:
    """Write the source, and return its size in bytes."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    size = 0
    with (folder / "rows.jsonl").open("w") as lines:
        for number in range(samples):
            path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path, quality=90)
            size += path.stat().st_size
            row = {
                "task": f"task_{number % 6}",
                "question": f"<image>What is picture {number}?",
                "answer": str(number),
                "answer_format": "exact",
                "images": [str(path.relative_to(folder))],
            }
            size += lines.write(json.dumps(row) + "\n")
    return size


def arms(source: Path, scratch: Path, workers: list[int]) -> dict[str, list[str]]:
    """Return what is timed: name -> command."""
    importing = [sys.executable, "-m", "megatron_g2rpo.cli", "data", "import", str(source / "rows.jsonl")]
    tar = ["tar", "-C", str(source), "-cf"]
    return {
        "tar": [*tar, str(scratch / "one.tar"), "."],
        **{
            f"import, {count} processes{', no decoding' if flag else ''}": [
                *(*importing, str(scratch / f"out{count}{flag}"), "--workers", str(count)),
                *([flag] if flag else []),
            ]
            for count in workers
            for flag in ("", "--no-decode")
        },
        f"import, {workers[-1]} processes, in two parts": [
            *(*importing, str(scratch / "parts"), "--workers", str(workers[-1]), "--split", "0.02")
        ],
        "tar, again": [*tar, str(scratch / "two.tar"), "."],
    }


def timed(command: list[str]) -> tuple[float, float, int]:
    """Run a command, and return its seconds, those of the processor, and the resident peak in bytes.

    The peak is that of the largest process so far, so that it is exact where processes only grow, as in this order.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, after.ru_maxrss * 1024


if __name__ == "__main__":
    main()
