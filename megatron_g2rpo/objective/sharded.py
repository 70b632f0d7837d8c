# SPDX-License-Identifier: Apache-2.0
"""Advantages and statistics of a batch whose rollouts are spread over the ranks of a process group.

The rollouts of one group may lie on several ranks, and the task stage ranks all rollouts of a task, so every rank
gathers all of them (24 bytes each, and 16 for each part of the reward), computes the same result, and keeps its own
part. Estimators do not depend on the order of the rollouts: the result is that of one process, bit for bit, for any
number of ranks and any split. The memory of an estimator is computed from the same batch on every rank, and therefore
equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rpo.collectives import all_gather, gather
from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, GroupStatistics, group_statistics
from megatron_g2rpo.objective.estimators import Estimator
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch, as_reward_batch, first_non_finite, non_finite_message


@dataclass(frozen=True, kw_only=True)
class ShardedAdvantages:
    """Advantages of a global batch of N rollouts, as one rank sees them.

    Attributes:
        advantages: float64 ``[N_local]`` on the CPU, advantages of this rank's rollouts.
        global_advantages: float64 ``[N]``, advantages of the rollouts of all ranks, in rank order.
        global_task_ids: int64 ``[N]``, task ids of the rollouts of all ranks, in rank order.
        statistics: statistics of the rewards of the global batch.
    """

    advantages: Tensor
    global_advantages: Tensor
    global_task_ids: Tensor
    statistics: GroupStatistics


def sharded_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    task_ids: Tensor,
    *,
    estimator: Estimator,
    process_group: ProcessGroup | None,
    history: History | None = None,
    parts: Mapping[str, Tensor] | None = None,
    part_weights: Mapping[str, Tensor | float] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> ShardedAdvantages:
    """Compute the advantages of this rank's rollouts within the global batch, and statistics of the global batch.

    It is a collective: every rank of ``process_group`` must call it, also a rank without rollouts.

    Args:
        rewards: float32 or float64 ``[N_local]`` on the CPU; N_local may differ from rank to rank and be 0.
        group_ids: int64 ``[N_local]``, ids of the prompts, unique over all ranks.
        task_ids: int64 ``[N_local]``, ids of the tasks.
        estimator: function from the global batch to advantages, see ``estimators``.
        process_group: the data-parallel ranks. Tensor-, pipeline- and context-parallel peers hold the same rollouts and
            must not be in it. None: this process holds all rollouts.
        history: memory of the estimator from earlier calls, updated in place; equal on every rank before the call and
            after it. None: an empty memory, as before the first call.
        parts: name -> float32 or float64 ``[N_local]``, the parts of the rewards; the same names on every rank (one
            without rollouts need not know them).
        part_weights: name -> a number, or ``[N_local]``, weight of each part in the reward; None: 1 each.
        tie_tolerance: rewards closer than this count as equal in the statistics.

    Raises:
        TypeError: the rollouts of a rank have another type or dtype; raised on every rank.
        ValueError: the rollouts of a rank cannot be read, ranks name different parts, or a reward or part is not
            finite; raised on every rank, and the message names the rank and the rollout.
    """
    shared = _gather(rewards, group_ids, task_ids, parts, part_weights, process_group)
    advantages = estimator(shared.batch, History() if history is None else history)
    return ShardedAdvantages(
        advantages=advantages[shared.mine].clone(),
        global_advantages=advantages,
        global_task_ids=shared.batch.task_ids,
        statistics=_statistics(shared.batch, tie_tolerance),
    )


def sharded_statistics(
    rewards: Tensor,
    group_ids: Tensor,
    task_ids: Tensor,
    *,
    process_group: ProcessGroup | None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> GroupStatistics:
    """Compute only statistics of the global batch. A collective; arguments and errors as in ``sharded_advantages``."""
    return _statistics(_gather(rewards, group_ids, task_ids, None, None, process_group).batch, tie_tolerance)


@dataclass(frozen=True)
class _Shared:
    """The rollouts of all ranks, in rank order, and the place of this rank's own."""

    batch: RewardBatch
    mine: slice


@dataclass(frozen=True)
class _Header:
    """The header that a rank sends before its rollouts: how many there are, and the names of their reward parts."""

    count: int
    parts: tuple[str, ...]


def _statistics(batch: RewardBatch, tie_tolerance: float) -> GroupStatistics:
    return group_statistics(batch.rewards, batch.group_ids, batch.task_ids, tie_tolerance=tie_tolerance)


def _gather(
    rewards: Tensor,
    group_ids: Tensor,
    task_ids: Tensor,
    parts: Mapping[str, Tensor] | None,
    part_weights: Mapping[str, Tensor | float] | None,
    process_group: ProcessGroup | None,
) -> _Shared:
    """Gather the rollouts of all ranks, and check that all could be read and all values are finite."""
    if process_group is None:
        batch = as_reward_batch(rewards, group_ids, task_ids, parts, part_weights)
        _check_finite(batch, None)
        return _Shared(batch, slice(0, len(batch)))
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("this process is not a member of the process group that it gathers over")
    local: list[RewardBatch] = []

    def read() -> _Header:
        try:
            local.append(as_reward_batch(rewards, group_ids, task_ids, parts, part_weights))
        except (TypeError, ValueError) as error:
            raise type(error)(f"data-parallel rank {rank} passed rollouts that can't be read: {error}") from error
        return _Header(len(local[0]), tuple(local[0].parts))

    headers = gather(read, process_group, (TypeError, ValueError))
    counts = [header.count for header in headers]
    everything = _all_gather(local[0], counts, _part_names(headers), process_group)
    _check_finite(everything, counts)
    offset = sum(counts[:rank])
    return _Shared(everything, slice(offset, offset + counts[rank]))


def _part_names(headers: list[_Header]) -> tuple[str, ...]:
    """Return the names of the parts, which must be equal on all ranks that have rollouts."""
    owners = {header.parts: rank for rank, header in enumerate(headers) if header.count > 0}
    if len(owners) > 1:
        known = "; ".join(f"rank {rank} has {', '.join(names) or 'none'}" for names, rank in sorted(owners.items()))
        raise ValueError(f"the data-parallel ranks name other parts of the reward: {known}")
    return next(iter(owners), ())


def _all_gather(
    batch: RewardBatch, counts: list[int], names: tuple[str, ...], process_group: ProcessGroup
) -> RewardBatch:
    """Gather the rollouts of all ranks, in rank order, with float64 rewards."""
    longest = max(counts)
    mine = torch.zeros(longest, 3 + 2 * len(names), dtype=torch.int64)
    if len(batch) > 0:
        doubles = [batch.rewards.double()]
        doubles += [batch.parts[name] for name in names] + [batch.part_weights[name] for name in names]
        columns = [
            batch.group_ids,
            batch.task_ids,
            *(values.view(torch.int64) for values in doubles),
        ]  # bits as integers
        mine[: len(batch)] = torch.stack(columns, dim=1)
    mine = mine.to(_wire_device(process_group))
    # Without a rollout on any rank there is nothing to send.
    received = all_gather(mine, group=process_group) if longest > 0 else [mine] * len(counts)
    table = torch.cat([share[:count] for share, count in zip(received, counts, strict=True)]).cpu()
    group_ids, task_ids, *bits = (column.contiguous() for column in table.unbind(1))
    rewards, *doubles = (column.view(torch.float64) for column in bits)
    return RewardBatch(
        rewards=rewards,
        group_ids=group_ids,
        task_ids=task_ids,
        parts=dict(zip(names, doubles[: len(names)], strict=True)),
        part_weights=dict(zip(names, doubles[len(names) :], strict=True)),
    )


def _wire_device(process_group: ProcessGroup) -> torch.device:
    """Return a device whose tensors the group can gather: the CPU where that is possible."""
    # The configuration reads "device:backend,device:backend".
    devices = [entry.split(":")[0] for entry in dist.get_backend_config(process_group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _check_finite(batch: RewardBatch, counts: list[int] | None) -> None:
    """Raise if a reward or part is not finite, naming the first one, and its rank if ``counts`` is given."""
    for name, values in [(None, batch.rewards), *batch.parts.items()]:
        bad = first_non_finite(values)
        if bad is None:
            continue
        where = f"rollout {bad}"
        if counts is not None:
            rank, index = _locate(bad, counts)
            where = f"rollout {index} of data-parallel rank {rank}"
        if name is None:
            raise ValueError(non_finite_message(batch, bad, where))
        raise ValueError(
            f"part {name!r} of the reward of {where} is {values[bad].item()} (group {batch.group_ids[bad].item()}, "
            f"task {batch.task_ids[bad].item()}); rewards must be finite"
        )


def _locate(index: int, counts: list[int]) -> tuple[int, int]:
    """Return (rank, index among the rollouts of that rank) for an index into the gathered rollouts."""
    for rank, count in enumerate(counts):
        if index < count:
            return rank, index
        index -= count
    raise IndexError("index beyond the gathered rollouts")
