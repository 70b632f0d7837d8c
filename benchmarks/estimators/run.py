# SPDX-License-Identifier: Apache-2.0
"""Run what ``conditions.py`` lists, one process a run, and keep of each what ``report.py`` needs.

    python benchmarks/estimators/run.py [--jobs 2] [--only plain]

Needs the quickstart's data (``make data``). Finished runs are not repeated: their results lie in ``results/``. With two
cores, two runs of one thread each take less time than one of two after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conditions import ARMS, BUDGET, RECIPE, SEEDS, SPIKE, SPIKE_SHARE, Arm

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/estimators")
KEPT = ("entropy", "response_tokens", "gradient_share", "advantage_std", "advantage_normal_distance")


def spike(rewards: Any, rollouts: Any) -> Any:
    """Rewards of which a share, drawn from what each response says, is ``SPIKE``; a component of its own."""

    def drawn(rollout: Any) -> float:
        text = f"{rollout.prompt.key} {rollout.sample_index} {rollout.response_ids.tolist()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    hit = torch.tensor([drawn(rollout) < SPIKE_SHARE for rollout in rollouts], dtype=torch.bool)
    return rewards.plus("spike", torch.where(hit, SPIKE - rewards.total, 0.0), 1.0)


def run_one(arm: Arm, seed: int) -> None:
    """One run in this process, its metrics condensed into ``results/``."""
    from megatron_g2rpo import recipe as recipes
    from megatron_g2rpo.policy.device import init_process_group, select
    from megatron_g2rpo.train import g2rpo
    from megatron_g2rpo.train.step import sampling

    directory = RUNS / arm.key(seed)
    overrides = [*BUDGET, *arm.overrides, f"grpo.seed={seed}", f"logger.log_dir={directory}"]
    recipe = recipes.load(RECIPE, overrides, "train")
    (directory / "metrics.jsonl").unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    init_process_group(select("cpu"))
    scored = sampling.scored

    def spiked(scoring: Any, rollouts: Any, **keywords: Any) -> Any:
        rewards, failed = scored(scoring, rollouts, **keywords)
        return spike(rewards, rollouts), failed

    with patch.object(sampling, "scored", spiked if arm.heavy_tailed else scored):
        g2rpo.train(recipe)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == recipe.grpo.max_num_steps
    RESULTS.mkdir(exist_ok=True)
    result = {
        "condition": arm.condition,
        "arm": arm.name,
        "seed": seed,
        "overrides": overrides[:-1],
        "series": {key: series(lines, key) for key in sorted(set().union(*lines)) if is_kept(key)},
    }
    (RESULTS / f"{arm.key(seed)}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")


def is_kept(key: str) -> bool:
    """Whether the report needs a metric."""
    name = key.rsplit("/", 1)[-1]
    if key.startswith("val/"):
        return name.removeprefix("mean_").removeprefix("greedy_") in ("reward", "accuracy")
    return key == "train/grad_norm" or name in KEPT


def series(lines: list[dict[str, float]], key: str) -> list[list[float]]:
    """Steps, and the values that were logged at them to four digits."""
    steps = [line["step"] for line in lines if key in line]
    return [steps, [float(f"{line[key]:.4g}") for line in lines if key in line]]


def main() -> None:
    """Start what is missing, or be one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", help="one condition")
    parser.add_argument("--key", help="one run, in this process")
    arguments = parser.parse_args()
    runs = {arm.key(seed): (arm, seed) for seed in SEEDS for arm in ARMS if arguments.only in (None, arm.condition)}
    if arguments.key:
        run_one(*runs[arguments.key])
        return
    missing = [key for key in runs if not (RESULTS / f"{key}.json").exists()]

    def start(key: str) -> None:
        (RUNS / key).mkdir(parents=True, exist_ok=True)
        with (RUNS / key / "output.txt").open("w") as output:
            command = [sys.executable, __file__, "--key", key]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode
        print(f"{key}: {'done' if code == 0 else f'FAILED, see {output.name}'}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, missing))


if __name__ == "__main__":
    main()
