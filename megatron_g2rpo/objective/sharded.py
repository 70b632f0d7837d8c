# SPDX-License-Identifier: Apache-2.0
"""Advantages of a batch whose rows are spread over the ranks of a process group.

The rows of one group may lie on several ranks, and the task stage ranks all rows of a task, so every rank gathers all
rows (24 bytes each), computes the same result, and keeps its own part. Estimators do not depend on the order of rows:
the result is that of one process, bit for bit, for any number of ranks and any split.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, GroupStatistics, group_statistics
from megatron_g2rpo.objective.estimators import Estimator
from megatron_g2rpo.objective.rows import Rows, as_rows, first_non_finite, non_finite_message

_INVALID = -1  # sent in place of a row count by a rank whose rows are unusable


def sharded_advantages(
    rewards: Tensor,
    groups: Tensor,
    tasks: Tensor,
    *,
    estimator: Estimator,
    group: ProcessGroup | None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> tuple[Tensor, GroupStatistics]:
    """Advantages of this rank's rows within the global batch, and statistics of the global batch.

    A collective: every rank of ``group`` must call it, also those without rows.

    Args:
        rewards: float32 or float64 ``[N_local]`` on the CPU; N_local may differ from rank to rank and be 0.
        groups: int64 ``[N_local]``, ids unique over all ranks.
        tasks: int64 ``[N_local]``.
        estimator: maps the global rows to advantages, see ``estimators``.
        group: the data-parallel group. Tensor-, pipeline- and context-parallel peers hold the same rows and must not be
            in it. None: this process holds all rows.
        tie_tolerance: of the statistics.

    Returns:
        (float64 ``[N_local]`` on the CPU, statistics of all rows).

    Raises:
        TypeError, ValueError: rows of this rank that can't be read.
        ValueError: on every rank, when another rank's rows can't be read or a reward of any rank is not finite; names
            the rank and the row.
    """
    if group is None:
        return estimator(rewards, groups, tasks), group_statistics(rewards, groups, tasks, tie_tolerance=tie_tolerance)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the process group that it gathers over")

    rows, counts = _exchange_counts(rewards, groups, tasks, group)
    everything = _all_gather(rows, counts, group)
    bad = first_non_finite(everything.rewards)
    if bad is not None:
        owner, row = _locate(bad, counts)
        raise ValueError(non_finite_message(everything, bad, f"row {row} of data-parallel rank {owner}"))

    offset = sum(counts[:rank])
    gathered = (everything.rewards, everything.groups, everything.tasks)
    advantages = estimator(*gathered)[offset : offset + counts[rank]]
    return advantages.clone(), group_statistics(*gathered, tie_tolerance=tie_tolerance)


def _exchange_counts(rewards: Tensor, groups: Tensor, tasks: Tensor, group: ProcessGroup) -> tuple[Rows, list[int]]:
    """Reads the local rows and learns the count of every rank; a rank that can't read its rows fails all of them."""
    rows = _read(rewards, groups, tasks)
    count = torch.tensor([len(rows) if isinstance(rows, Rows) else _INVALID], device=_wire_device(group))
    received = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, count, group=group)
    counts = [int(entry.item()) for entry in received]
    if not isinstance(rows, Rows):
        raise rows
    if _INVALID in counts:
        raise ValueError(f"data-parallel rank {counts.index(_INVALID)} passed rows that can't be read; see its error")
    return rows, counts


def _read(rewards: Tensor, groups: Tensor, tasks: Tensor) -> Rows | TypeError | ValueError:
    """Returns the error instead of raising it: the other ranks wait for a count and must hear of it first."""
    try:
        return as_rows(rewards, groups, tasks)
    except (TypeError, ValueError) as error:
        return error


def _all_gather(rows: Rows, counts: list[int], group: ProcessGroup) -> Rows:
    """Returns the rows of all ranks, in rank order, with float64 rewards."""
    longest = max(counts)
    mine = torch.zeros(longest, 3, dtype=torch.int64)
    mine[: len(rows), 0] = rows.rewards.double().view(torch.int64)  # the bits of the double travel as an integer
    mine[: len(rows), 1] = rows.groups
    mine[: len(rows), 2] = rows.tasks
    mine = mine.to(_wire_device(group))
    received = [torch.empty_like(mine) for _ in counts]
    if longest > 0:
        dist.all_gather(received, mine, group=group)
    table = torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).cpu()
    rewards, groups, tasks = (column.contiguous() for column in table.unbind(1))
    return Rows(rewards=rewards.view(torch.float64), groups=groups, tasks=tasks)


def _wire_device(group: ProcessGroup) -> torch.device:
    """The device whose tensors the group can gather; the CPU where it can."""
    # The configuration reads "device:backend,device:backend".
    devices = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _locate(index: int, counts: list[int]) -> tuple[int, int]:
    """Turns an index into the gathered rows into (rank, row of that rank)."""
    for rank, count in enumerate(counts):
        if index < count:
            return rank, index
        index -= count
    raise IndexError("index beyond the gathered rows")
