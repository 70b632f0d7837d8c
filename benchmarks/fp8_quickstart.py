# SPDX-License-Identifier: Apache-2.0
"""The quickstart in bfloat16 and in each FP8 recipe: rewards, gradient norms, and the gap between engine and trainer.

    python benchmarks/fp8_quickstart.py [--steps 8] [--results runs/fp8-quickstart]    # on a GPU
    python -m tests.gpu.virtual_cuda --transformer-engine python benchmarks/fp8_quickstart.py    # without one

Three seeds an arm, with and without the truncated importance-sampling correction, one run after the other, one process
each; then the tables of docs/fp8.md, to standard output. Needs Transformer Engine and the quickstart's data
(``make data``). Finished runs are not repeated: their metrics lie in the results folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

RECIPE = "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
SEEDS = (1, 2, 3)
TRUNCATED_RATIO = 2.0
_MEGATRON = "policy.megatron_cfg"
_ENGINE = ("policy.precision=bfloat16", f"{_MEGATRON}.transformer_impl=transformer_engine")


def _fp8(recipe: str, fp8_format: str) -> tuple[str, ...]:
    keys = {"enabled": "true", "fp8_recipe": recipe, "fp8": fp8_format}
    return (*_ENGINE, *(f"{_MEGATRON}.fp8_cfg.{key}={value}" for key, value in keys.items()))


# Arm -> the recipe's changed keys. The first is what bfloat16 itself is measured against, the second what FP8 is.
ARMS = {
    "float32": ("policy.precision=float32", f"{_MEGATRON}.transformer_impl=local", f"{_MEGATRON}.core_attention=local"),
    "bfloat16": _ENGINE,
    "delayed": _fp8("delayed", "hybrid"),
    "tensorwise": _fp8("tensorwise", "hybrid"),
    "blockwise": _fp8("blockwise", "e4m3"),
}
# Nothing but the steps.
BARE = (
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "grpo.val_period=0",
    "checkpointing.enabled=false",
    "checkpointing.export_hf=false",
)
# Metrics of a run, one dictionary a step.
Lines = list[dict[str, float]]


def keys() -> Iterator[tuple[str, bool, int]]:
    """Arm, whether it is corrected, and seed of every run; what can be compared first comes first."""
    for corrected in (False, True):
        for seed in SEEDS:
            for arm in ARMS:
                if not (corrected and arm == "float32"):
                    yield arm, corrected, seed


def name(arm: str, corrected: bool, seed: int) -> str:
    """What a run is called."""
    return f"{arm}{'-corrected' if corrected else ''}-{seed}"


def run(arm: str, corrected: bool, seed: int, steps: int, results: Path) -> None:
    """One run in a process of its own, its metrics kept as ``NAME.jsonl``; does nothing where they are there already.

    Raises:
        SystemExit: the run failed; its output is in the results folder.
    """
    kept = results / f"{name(arm, corrected, seed)}.jsonl"
    if kept.exists():
        return
    directory = results / name(arm, corrected, seed)
    correction = (f"loss_fn.importance_sampling.truncated_ratio={TRUNCATED_RATIO}",) if corrected else ()
    loop = (f"grpo.seed={seed}", f"grpo.max_num_steps={steps}", f"logger.log_dir={directory}")
    command = [sys.executable, "-m", "megatron_g2rpo.cli", "train", RECIPE, "--fresh"]
    results.mkdir(parents=True, exist_ok=True)
    log = directory.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(
            [*command, *ARMS[arm], *correction, *BARE, *loop],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{directory.name} failed, see {log}")
    (directory / "metrics.jsonl").rename(kept)


def read(results: Path, arm: str, corrected: bool) -> dict[int, Lines]:
    """Seed -> the metrics of its steps, of the runs that are finished."""
    files = {seed: results / f"{name(arm, corrected, seed)}.jsonl" for seed in SEEDS}
    return {
        seed: [json.loads(line) for line in file.read_text().splitlines()]
        for seed, file in files.items()
        if file.exists()
    }


def _label(arm: str, corrected: bool) -> str:
    return f"{arm}, corrected" if corrected else arm


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and range."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rewards(results: Path) -> Iterator[str]:
    """Rows of the table of rewards: the mean over seeds at every step, and the mean over all steps with its range."""
    for corrected in (False, True):
        for arm in ARMS:
            runs = read(results, arm, corrected)
            if runs:
                steps = zip(*([line["train/reward"] for line in lines] for lines in runs.values()), strict=True)
                level = [statistics.fmean(line["train/reward"] for line in lines) for lines in runs.values()]
                curve = " | ".join(f"{statistics.fmean(values):.3f}" for values in steps)
                yield f"| {_label(arm, corrected)} | {len(runs)} | {curve} | {spread(level, 3)} |"


def gradients(results: Path, base: str) -> Iterator[str]:
    """Rows of the table of gradient norms, as ratios to those of the arm ``base`` at the same step of the same seed."""
    for corrected in (False, True):
        reference = read(results, base, corrected)
        for arm in ARMS:
            runs = read(results, arm, corrected)
            ratios = [
                [line["train/grad_norm"] / other["train/grad_norm"] for line, other in zip(lines, against, strict=True)]
                for lines, against in ((runs[seed], reference[seed]) for seed in runs if seed in reference)
            ]
            if ratios and arm != base:
                first = spread([row[0] for row in ratios], 3)
                later = spread([value for row in ratios for value in row[1:]], 2)
                yield f"| {_label(arm, corrected)} | {len(ratios)} | {first} | {later} |"


def gaps(results: Path) -> Iterator[str]:
    """Rows of the table of gaps: means over steps and seeds, the largest of all, and what the correction cut."""
    columns = {"mean": statistics.fmean, "kl": statistics.fmean, "max": max}
    for corrected in (False, True):
        for arm in ARMS:
            runs = read(results, arm, corrected)
            lines = [line for run in runs.values() for line in run]
            if lines:
                gap = [f"{of([line[f'train/rollout_gap_{key}'] for line in lines]):.2g}" for key, of in columns.items()]
                ratio = max(abs(line["train/ratio"] - 1.0) for line in lines)
                cut = statistics.fmean(line.get("train/importance_truncated", 0.0) for line in lines)
                share = f"{cut:.2%}" if corrected else "-"
                yield f"| {_label(arm, corrected)} | {len(runs)} | {' | '.join(gap)} | {ratio:.2g} | {share} |"


def report(results: Path, steps: int) -> None:
    """Print the tables of the runs that are finished."""
    numbers = " | ".join(map(str, range(1, steps + 1)))
    print(f"| arithmetic | seeds | {numbers} | all steps |\n|---|---|{'---|' * (steps + 1)}")
    print("\n".join(rewards(results)), "\n")
    print("| arithmetic | seeds | first step | later steps |\n|---|---|---|---|")
    print("\n".join(gradients(results, "bfloat16")), "\n")
    print("| arithmetic | seeds | mean, nats | KL, nats | largest, nats | ratio off 1 by | truncated |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(gaps(results)))


def main() -> None:
    """Make the runs that are missing, then print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("runs/fp8-quickstart"))
    parser.add_argument("--report", action="store_true", help="only print the tables of the runs that are finished")
    arguments = parser.parse_args()
    if not arguments.report:
        for arm, corrected, seed in keys():
            run(arm, corrected, seed, arguments.steps, arguments.results)
    report(arguments.results, arguments.steps)


if __name__ == "__main__":
    main()
