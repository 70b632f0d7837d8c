# SPDX-License-Identifier: Apache-2.0
"""One rank of test_sharded_advantages.py: compares with one process, on groups of 1, 2 and 3 ranks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import GroupStatistics, estimators, sharded_advantages

ESTIMATORS = {
    "g2rpo": estimators.get("g2rpo"),
    "g2rpo, kept, unit": estimators.bind("g2rpo", zero_variance="keep", variance="unit"),
    "grpo": estimators.get("grpo"),
}
Rows = tuple[Tensor, Tensor, Tensor]


def global_rows(seed: int) -> Rows:
    """120 rollouts of 15 prompts and 3 tasks, with ties and all-equal groups, in random order."""
    rng = np.random.default_rng(seed)
    rewards = np.concatenate([rng.integers(0, grid, 8) / 7 for grid in rng.integers(1, 6, 15)])
    groups = np.repeat(rng.integers(-(2**63), 2**63 - 1, 15), 8)
    tasks = np.repeat(rng.choice([-1, 5, 2**63 - 1], 15), 8)
    order = rng.permutation(120)
    return tuple(torch.from_numpy(column[order]) for column in (rewards, groups, tasks))  # type: ignore[return-value]


def boundaries(seed: int, world: int) -> list[int]:
    """Where to cut the rows: at random; every third seed leaves a rank without rows."""
    cuts = sorted(np.random.default_rng(1000 + seed).integers(0, 121, world - 1).tolist())
    if seed % 3 == 0 and world > 1:
        cuts[0] = 0
    return [0, *cuts, 120]


def assert_same_bits(actual: GroupStatistics, expected: GroupStatistics) -> None:
    for ours, theirs in ((actual.groups, expected.groups), (actual.tasks, expected.tasks)):
        for name in ("id", "count", "mean", "std", "min", "max", "distinct"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def check_equal_to_one_process(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for seed in range(6):
        rows, cuts = global_rows(seed), boundaries(seed, world)
        mine = slice(cuts[rank], cuts[rank + 1])
        for name, estimator in ESTIMATORS.items():
            expected, statistics = sharded_advantages(*rows, estimator=estimator, group=None)
            assert expected.abs().max() > 1, "the comparison needs advantages"
            local = tuple(column[mine] for column in rows)
            actual, gathered = sharded_advantages(*local, estimator=estimator, group=group)
            same = torch.equal(actual.view(torch.int64), expected[mine].view(torch.int64))
            assert same, f"{name}, seed {seed}, rank {rank} of {world}"
            assert_same_bits(gathered, statistics)


def check_no_rows_at_all(group: dist.ProcessGroup) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    advantages, statistics = sharded_advantages(
        empty.double(), empty, empty, estimator=ESTIMATORS["g2rpo"], group=group
    )
    assert len(advantages) == len(statistics.groups.id) == 0


def check_errors_reach_every_rank(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    last = world - 1
    rewards, groups = torch.arange(4.0), torch.arange(4) + 10 * rank
    if rank == last:
        rewards[2] = torch.nan
    message = error_of(rewards, groups, groups, group)
    assert f"row 2 of data-parallel rank {last} is nan (group {10 * last + 2}, task {10 * last + 2})" in message, (
        message
    )

    message = error_of(torch.zeros(4), groups[: 3 if rank == last else 4], groups, group)
    expected = "lengths 4, 3 and 4" if rank == last else f"data-parallel rank {last} passed rows that can't be read"
    assert expected in message, message


def error_of(rewards: Tensor, groups: Tensor, tasks: Tensor, group: dist.ProcessGroup) -> str:
    try:
        sharded_advantages(rewards, groups, tasks, estimator=ESTIMATORS["g2rpo"], group=group)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error was raised")


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for members in ([0], [0, 1], [2, 1], [0, 1, 2]):
        group = dist.new_group(members)
        if rank in members:
            check_equal_to_one_process(group)
            check_no_rows_at_all(group)
            check_errors_reach_every_rank(group)
    print(f"sharded advantages agree on rank {rank}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
