# SPDX-License-Identifier: Apache-2.0
"""Advantages and statistics of a batch whose rows are spread over the ranks of a process group.

The rows of one group may lie on several ranks, and the task stage ranks all rows of a task, so every rank gathers all
rows (24 bytes each, and 8 for each reward component), computes the same result, and keeps its own part. Estimators do
not depend on the order of rows: the result is that of one process, bit for bit, for any number of ranks and any split.
What an estimator remembers is computed from the same rows, and hence the same, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rpo.collectives import gather
from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, GroupStatistics, group_statistics
from megatron_g2rpo.objective.estimators import Estimator
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch, as_reward_batch, first_non_finite, non_finite_message


def sharded_advantages(
    rewards: Tensor,
    groups: Tensor,
    tasks: Tensor,
    *,
    estimator: Estimator,
    group: ProcessGroup | None,
    history: History | None = None,
    parts: Mapping[str, Tensor] | None = None,
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
        history: what the estimator remembers of earlier calls, updated in place; equal on every rank before the call
            and after it. None: the call is an estimator's first.
        parts: name -> float32 or float64 ``[N_local]``, the components of the rewards; the same names on every rank
            (one without rows need not know them).
        tie_tolerance: of the statistics.

    Returns:
        (float64 ``[N_local]`` on the CPU, statistics of all rows).

    Raises:
        TypeError, ValueError: rows of this rank that can't be read.
        ValueError: on every rank, when another rank's rows can't be read, the ranks name other components, or a reward
            or component of any rank is not finite; names the rank and the row.
    """
    batch = _gather(rewards, groups, tasks, parts, group)
    advantages = estimator(batch.rows, History() if history is None else history)
    return advantages[batch.mine].clone(), _statistics(batch.rows, tie_tolerance)


def sharded_statistics(
    rewards: Tensor,
    groups: Tensor,
    tasks: Tensor,
    *,
    group: ProcessGroup | None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> GroupStatistics:
    """Statistics of the global batch alone; a collective, with the arguments and errors of ``sharded_advantages``."""
    return _statistics(_gather(rewards, groups, tasks, None, group).rows, tie_tolerance)


@dataclass(frozen=True)
class _Batch:
    """The rows of all ranks, in rank order, and which of them are this rank's."""

    rows: RewardBatch
    mine: slice


@dataclass(frozen=True)
class _Header:
    """What a rank tells the others of its rows: how many, and which components."""

    count: int
    parts: tuple[str, ...]


def _statistics(rows: RewardBatch, tie_tolerance: float) -> GroupStatistics:
    return group_statistics(rows.rewards, rows.groups, rows.tasks, tie_tolerance=tie_tolerance)


def _gather(
    rewards: Tensor, groups: Tensor, tasks: Tensor, parts: Mapping[str, Tensor] | None, group: ProcessGroup | None
) -> _Batch:
    """Every rank's rows, checked: all of them could be read, and all values are finite."""
    if group is None:
        rows = as_reward_batch(rewards, groups, tasks, parts)
        _check_finite(rows, None)
        return _Batch(rows, slice(0, len(rows)))
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the process group that it gathers over")
    rows, headers = _exchange_headers(rewards, groups, tasks, parts, group)
    counts = [header.count for header in headers]
    everything = _all_gather(rows, counts, _component_names(headers), group)
    _check_finite(everything, counts)
    offset = sum(counts[:rank])
    return _Batch(everything, slice(offset, offset + counts[rank]))


def _exchange_headers(
    rewards: Tensor, groups: Tensor, tasks: Tensor, parts: Mapping[str, Tensor] | None, group: ProcessGroup
) -> tuple[RewardBatch, list[_Header]]:
    """Reads the local rows and learns of every rank's; a rank that can't read its rows fails all of them."""
    local: list[RewardBatch] = []

    def read() -> _Header:
        try:
            local.append(as_reward_batch(rewards, groups, tasks, parts))
        except (TypeError, ValueError) as error:
            where = f"data-parallel rank {dist.get_rank(group)} passed rows that can't be read"
            raise type(error)(f"{where}: {error}") from error
        return _Header(len(local[0]), tuple(local[0].parts))

    headers = gather(read, group, (TypeError, ValueError))
    return local[0], headers


def _component_names(headers: list[_Header]) -> tuple[str, ...]:
    """Names of the components, which all ranks with rows must share; a rank without rows need not know them."""
    owners = {header.parts: rank for rank, header in enumerate(headers) if header.count > 0}
    if len(owners) > 1:
        known = "; ".join(f"rank {rank} has {', '.join(names) or 'none'}" for names, rank in sorted(owners.items()))
        raise ValueError(f"the data-parallel ranks name other reward components: {known}")
    return next(iter(owners), ())


def _all_gather(rows: RewardBatch, counts: list[int], names: tuple[str, ...], group: ProcessGroup) -> RewardBatch:
    """Returns the rows of all ranks, in rank order, with float64 rewards."""
    longest = max(counts)
    mine = torch.zeros(longest, 3 + len(names), dtype=torch.int64)
    if len(rows) > 0:
        doubles = [rows.rewards.double(), *(rows.parts[name] for name in names)]
        columns = [rows.groups, rows.tasks, *(values.view(torch.int64) for values in doubles)]  # bits as integers
        mine[: len(rows)] = torch.stack(columns, dim=1)
    mine = mine.to(_wire_device(group))
    received = [torch.empty_like(mine) for _ in counts]
    if longest > 0:
        dist.all_gather(received, mine, group=group)
    table = torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).cpu()
    groups, tasks, *doubles = (column.contiguous() for column in table.unbind(1))
    rewards, *parts = (bits.view(torch.float64) for bits in doubles)
    return RewardBatch(rewards=rewards, groups=groups, tasks=tasks, parts=dict(zip(names, parts, strict=True)))


def _wire_device(group: ProcessGroup) -> torch.device:
    """The device whose tensors the group can gather; the CPU where it can."""
    # The configuration reads "device:backend,device:backend".
    devices = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _check_finite(rows: RewardBatch, counts: list[int] | None) -> None:
    """Names the first reward, or component of one, that is not finite, and with ``counts`` the rank it came from."""
    for name, values in [(None, rows.rewards), *rows.parts.items()]:
        bad = first_non_finite(values)
        if bad is None:
            continue
        where = f"row {bad}"
        if counts is not None:
            rank, row = _locate(bad, counts)
            where = f"row {row} of data-parallel rank {rank}"
        if name is None:
            raise ValueError(non_finite_message(rows, bad, where))
        raise ValueError(
            f"part {name!r} of the reward of {where} is {values[bad].item()} (group {rows.groups[bad].item()}, "
            f"task {rows.tasks[bad].item()}); rewards must be finite"
        )


def _locate(index: int, counts: list[int]) -> tuple[int, int]:
    """Turns an index into the gathered rows into (rank, row of that rank)."""
    for rank, count in enumerate(counts):
        if index < count:
            return rank, index
        index -= count
    raise IndexError("index beyond the gathered rows")
