# SPDX-License-Identifier: Apache-2.0
"""One rank of test_sharded_advantages.py: compares with one process, on groups of 1 to 4 ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import GroupStatistics, estimators, sharded_advantages
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch, as_reward_batch
from megatron_g2rpo.objective.sharded import sharded_statistics
from tests.common.launch import report_result

# Ranks of each group that is tried.
GROUPS = ([0], [0, 1], [2, 1], [3, 0, 2], [0, 1, 2, 3])
STEPS = 2
ROWS = 120
WEIGHTS = {"accuracy": 0.9, "format": 0.1, "length": 0.3}
ESTIMATORS = {
    **{name: estimators.get(name) for name in estimators.names()},
    "g2rpo, kept, unit": estimators.bind("g2rpo", zero_variance="keep", variance="unit"),
    "g2_gdpo, kept, unit": estimators.bind("g2_gdpo", zero_variance="keep", variance="unit"),
    "reinforce_plus_plus, batch": estimators.bind("reinforce_plus_plus", baseline="batch"),
}


def global_rows(seed: int) -> RewardBatch:
    """120 rollouts of 15 prompts and 3 tasks, with ties and all-equal groups, in random order."""
    rng = np.random.default_rng(seed)
    accuracy, form = (
        np.concatenate([rng.integers(0, grid, 8) / 7 for grid in rng.integers(1, 6, 15)]) for _ in range(2)
    )
    parts = {"accuracy": accuracy, "format": form, "length": rng.normal(size=ROWS)}
    groups = np.repeat(rng.integers(-(2**63), 2**63 - 1, 15), 8)
    tasks = np.repeat(rng.choice([-1, 5, 2**63 - 1], 15), 8)
    order = rng.permutation(ROWS)
    columns = {name: torch.from_numpy(part[order]) for name, part in parts.items()}
    # Another weight for one of the tasks: weights travel with the rollouts.
    weights = {name: torch.full((ROWS,), weight, dtype=torch.float64) for name, weight in WEIGHTS.items()}
    weights["length"][torch.from_numpy(tasks[order] == 5)] = 0.0
    rewards = accuracy[order] * 0.9 + form[order] * 0.1
    return as_reward_batch(rewards, groups[order], tasks[order], columns, weights)


def rows_of_rank(seed: int, rank: int, world: int) -> Tensor:
    """Which of the rows a rank owns, in which order: at random; every third seed leaves a rank without any."""
    rng = np.random.default_rng(1000 + seed)
    owner = rng.choice(world, ROWS, p=rng.dirichlet(np.ones(world)))
    if seed % 3 == 0 and world > 1:
        owner[owner == seed % world] = (seed + 1) % world
    return torch.from_numpy(np.random.default_rng(2000 + seed).permutation(np.flatnonzero(owner == rank)))


def call(
    rows: RewardBatch, mine: Tensor, group: dist.ProcessGroup | None, estimator: estimators.Estimator, history: History
):
    # A rank without rollouts has met no part, and need not name one.
    parts: Mapping[str, Tensor] = {name: part[mine] for name, part in rows.parts.items()} if len(mine) else {}
    weights = {name: rows.part_weights[name][mine] for name in parts}
    local = rows.rewards[mine], rows.group_ids[mine], rows.task_ids[mine]
    return sharded_advantages(
        *local, estimator=estimator, process_group=group, history=history, parts=parts, part_weights=weights
    )


def assert_same_bits(actual: GroupStatistics, expected: GroupStatistics) -> None:
    for ours, theirs in ((actual.groups, expected.groups), (actual.tasks, expected.tasks)):
        for name in ("id", "count", "mean", "std", "min", "max", "distinct"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def check_equal_to_one_process(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for seed in range(3):
        for name, estimator in ESTIMATORS.items():
            one, sharded = History(), History()
            for step in range(STEPS):
                rows = global_rows(STEPS * seed + step)
                mine = rows_of_rank(STEPS * seed + step, rank, world)
                whole = call(rows, torch.arange(ROWS), None, estimator, one)
                expected, statistics = whole.advantages, whole.statistics
                assert len(expected.unique()) > 3, "the comparison needs advantages"
                shared = call(rows, mine, group, estimator, sharded)
                same = torch.equal(shared.advantages.view(torch.int64), expected[mine].view(torch.int64))
                assert same, f"{name}, seed {seed}, step {step}, rank {rank} of {world}"
                assert sharded.state_dict() == one.state_dict(), f"{name}, seed {seed}, step {step}"
                assert_same_bits(shared.statistics, statistics)
                # In rank order, hence another order; of the same rollouts.
                assert torch.equal(shared.global_advantages.sort().values, expected.sort().values)
                assert torch.equal(shared.global_task_ids.sort().values, rows.task_ids.sort().values)
            assert bool(one.moments) == (name == "ema_grpo")
        local = rows.rewards[mine], rows.group_ids[mine], rows.task_ids[mine]
        assert_same_bits(sharded_statistics(*local, process_group=group), statistics)


def check_no_rows_at_all(group: dist.ProcessGroup) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for estimator in ESTIMATORS.values():
        shared = sharded_advantages(empty.double(), empty, empty, estimator=estimator, process_group=group)
        assert len(shared.advantages) == len(shared.statistics.groups.id) == 0


def check_errors_reach_every_rank(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    last = world - 1
    groups, zeros, bad = torch.arange(4) + 10 * rank, torch.zeros(4), torch.arange(4.0)
    if rank == last:
        bad[2] = torch.nan
    named = f"rollout 2 of data-parallel rank {last} is nan (group {10 * last + 2}, task {10 * last + 2})"

    message = error_of(bad, groups, groups, group)
    assert f"reward of {named}" in message, message
    message = error_of(zeros, groups, groups, group, {"format": zeros, "length": bad})
    assert f"part 'length' of the reward of {named}" in message, message

    message = error_of(zeros, groups[: 3 if rank == last else 4], groups, group)
    assert "lengths 4, 3 and 4" in message, message
    assert f"data-parallel rank {last} passed rollouts that can't be read" in message, message

    names = ("format", "length") if rank == last else ("format",)
    if world > 1:
        message = error_of(zeros, groups, groups, group, dict.fromkeys(names, zeros))
        assert f"rank {last} has format, length" in message, message
        assert f"rank {last - 1} has format;" in message, message


def error_of(
    rewards: Tensor, groups: Tensor, tasks: Tensor, group: dist.ProcessGroup, parts: Mapping[str, Tensor] | None = None
) -> str:
    try:
        sharded_advantages(rewards, groups, tasks, estimator=ESTIMATORS["g2rpo"], process_group=group, parts=parts)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error was raised")


def main() -> None:
    dist.init_process_group("gloo")
    checked = []
    for members in GROUPS:
        group = dist.new_group(members)
        if dist.get_rank() in members:
            check_equal_to_one_process(group)
            check_no_rows_at_all(group)
            check_errors_reach_every_rank(group)
            checked.append(members)
    report_result(checked)


if __name__ == "__main__":
    main()
