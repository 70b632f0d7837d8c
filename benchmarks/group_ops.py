# SPDX-License-Identifier: Apache-2.0
"""Time of the group-statistics op: advantages and statistics, beside numpy.sort of the same rewards.

A sort is the least that one would expect, as advantages are a function of ranks; numpy's uses the widest vectors of the
CPU. The arms take turns on one thread, after one turn that is not counted. Printed are medians over the turns, in
milliseconds, and quartiles of the ratio of advantages to sort, which is taken within each turn. All times are the
processor's, the fairer clock on a machine that others use; the wall clock's is beside it for the advantages. The arm
"loop" is what one writes first, one Python iteration a group over torch operations
(``megatron_g2rpo.objective.group_ops_torch``).

    python benchmarks/group_ops.py

The rollouts of a group lie together, as they do in training, and every group belongs to one of six tasks at random.
"Continuous" rewards have no ties, "binary" ones nothing else; "scattered" rows are in random order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_g2rpo.objective import backend, gaussian_advantages, group_statistics
from megatron_g2rpo.objective.group_ops_torch import gaussian_advantages as loop
from megatron_g2rpo.objective.reward_batch import as_reward_batch

TASKS = 6
LOOP_MOST_ROLLOUTS = 65_536  # seconds a turn beyond


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    rollouts: int
    group_size: int
    rewards: str = "continuous"
    scattered: bool = False
    turns: int = 15

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, group ids and task ids."""
        rng = np.random.default_rng(0)
        count = self.rollouts // self.group_size
        rewards = rng.random(self.rollouts) if self.rewards == "continuous" else rng.integers(0, 2, self.rollouts) * 1.0
        groups = np.repeat(np.arange(count), self.group_size)
        tasks = np.repeat(rng.integers(0, TASKS, count), self.group_size)
        order = rng.permutation(self.rollouts) if self.scattered else slice(None)
        return rewards[order], groups[order], tasks[order]


CASES = (
    Case(4_096, 8, turns=201),
    Case(65_536, 32, turns=51),
    Case(1_048_576, 32, turns=25),
    Case(1_048_576, 32, "binary"),
    Case(1_048_576, 32, scattered=True),
    Case(1_048_576, 8),
    Case(1_048_576, 128),
    Case(10_000_000, 32, turns=5),
)


def seconds(arm: Callable[[], object]) -> tuple[float, float]:
    """Processor's and wall clock's time of one call."""
    processor, wall = time.process_time(), time.perf_counter()
    arm()
    return time.process_time() - processor, time.perf_counter() - wall


def measure(case: Case) -> str:
    """Returns the case's row of the table."""
    batch = case.columns()
    arms: dict[str, Callable[[], object]] = {
        "sort": lambda: np.sort(batch[0]),
        "advantages": lambda: gaussian_advantages(*batch),
        "statistics": lambda: group_statistics(*batch),
    }
    for arm in arms.values():
        arm()
    turns = [{name: seconds(arm) for name, arm in arms.items()} for _ in range(case.turns)]
    ratios = [turn["advantages"][0] / turn["sort"][0] for turn in turns]
    times = {name: 1e3 * statistics.median(turn[name][0] for turn in turns) for name in arms}
    wall = 1e3 * statistics.median(turn["advantages"][1] for turn in turns)
    looped = "-"
    if case.rollouts <= LOOP_MOST_ROLLOUTS:
        options = {"stages": ("group", "task"), "tie_tolerance": 1e-6, "drop_zero_variance": True}
        took = min(seconds(lambda: loop(as_reward_batch(*batch), unit_variance=False, **options))[0] for _ in range(3))
        looped = f"{1e3 * took:,.0f}"
    what = case.rewards + (", scattered" if case.scattered else "")
    low, middle, high = statistics.quantiles(ratios, n=4)
    ratio = f"{middle:.1f} ({low:.1f}-{high:.1f})"
    return (
        f"| {case.rollouts:,} | {case.rollouts // case.group_size:,} | {what} | {times['sort']:.3g} | "
        f"{times['advantages']:.3g} | {wall:.3g} | {ratio} | {times['statistics']:.3g} | {looped} |"
    )


def main() -> None:
    """Print the table, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10_000_000, help="leave out cases of more rollouts")
    most = parser.parse_args().most
    if backend() != "cpp":
        raise SystemExit("the compiled op is not built: this would measure its torch stand-in")
    torch.set_num_threads(1)
    print("| rollouts | groups | rewards | sort | advantages | wall | ratio | statistics | loop |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if case.rollouts <= most:
            print(measure(case), flush=True)


if __name__ == "__main__":
    main()
