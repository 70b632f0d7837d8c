# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step: rewards by part and task, the health of the objective, the gap of the rollout engine.

``step_metrics`` is what the loop calls; the functions below it say what each group of metrics is. ``tasks`` are always
task names in the order of their ids, ``process_group`` the data-parallel ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.objective import AdvantageDiagnostics, GroupStatistics, importance
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.train.step.advantages import Advantages
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import PackedBatch, Rewards, Rollout, task_ids_of


def step_metrics(
    tasks: Sequence[str],
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    advantages: Advantages,
    minibatches: Sequence[Minibatch],
    updates: Sequence[Mapping[str, float]],
    *,
    env: Env,
    truncated_ratio: float | None,
    process_group: dist.ProcessGroup,
) -> dict[str, float]:
    """Everything that is said of a step, over the global batch. A collective of the data-parallel ranks.

    Means over rollouts leave out those without a reward.

    Args:
        tasks: task names in the order of their ids.
        rollouts: this rank's rollouts of the step.
        rewards: the rewards of these rollouts.
        advantages: the advantages of these rollouts, and what is known of the global batch's.
        minibatches: the rollouts, packed, with their log-probabilities.
        updates: the metrics of each update; their means are the step's.
        env: the recipe's section, for the length rewards of its tasks.
        truncated_ratio: bound at which importance weights are truncated; None if they are not.
        process_group: the data-parallel ranks.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch.micro_batches]
    rows = (~rewards.failed).nonzero().flatten()
    kept = [rollouts[index] for index in rows.tolist()]
    return {
        **rollout_metrics(tasks, kept, rewards[rows], process_group),
        **length_metrics(env, tasks, kept, process_group),
        **group_metrics(tasks, rollouts, advantages.statistics, process_group),
        **advantage_metrics(tasks, advantages.diagnostics),
        **_mean_over(updates),
        **gap_metrics(tasks, batches, process_group),
        **importance_metrics(truncated_ratio, batches, process_group),
        **packing_metrics(batches, process_group),
    }


def skipped_metrics(skipped: Mapping[str, int]) -> dict[str, float]:
    """``train/skipped_samples``: bad samples that a step replaced (``data.on_bad_sample: skip``). A collective.

    Where there are any, ``train/skipped/<reason>`` counts them by reason (``SampleError.reason``).

    Args:
        skipped: reason -> samples that this process replaced during the step.
    """
    total = torch.tensor([sum(skipped.values())])
    all_reduce(total)
    metrics = {"train/skipped_samples": float(total)}
    if total == 0:
        return metrics
    everyone: list[Mapping[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(skipped))
    reasons: Counter[str] = Counter()
    for counts in everyone:
        reasons.update(counts)
    return {**metrics, **{f"train/skipped/{reason}": float(reasons[reason]) for reason in sorted(reasons)}}


def memory_metrics(device: Device) -> dict[str, float]:
    """``memory/peak_gb``, 10^9 bytes on the rank with the most (``Device.peak_memory``). A collective of all ranks."""
    peak = torch.tensor([device.peak_memory()])
    all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"memory/peak_gb": float(peak) / 1e9}


def rollout_metrics(
    tasks: Sequence[str], rollouts: Sequence[Rollout], rewards: Rewards, process_group: dist.ProcessGroup
) -> dict[str, float]:
    """Means over the global batch, overall and per task, such as ``train/<task>/accuracy``. A collective."""
    columns = {
        "reward": rewards.total,
        **rewards.parts,
        "response_tokens": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.float64),
        "truncated": torch.tensor([r.truncated for r in rollouts], dtype=torch.float64),
    }
    counts, means = _means_by_task(tasks, task_ids_of(rollouts), columns, process_group)
    metrics = {f"train/{name}": float((means[name] * counts).nansum() / counts.sum()) for name in columns}
    return {**metrics, **_by_task(tasks, means)}


def length_metrics(
    env: Env, tasks: Sequence[str], rollouts: Sequence[Rollout], process_group: dist.ProcessGroup
) -> dict[str, float]:
    """Share of a task's responses that are shorter or longer than the plateau of its length reward. A collective.

    ``train/<task>/length_below`` and ``.../length_above``; nothing for tasks without length reward.
    """
    bounds = {task: settings.length for task, settings in env.tasks.items() if settings.length is not None}
    shaped = [rollout for rollout in rollouts if rollout.prompt.task in bounds]
    lengths = [(len(rollout.response_ids), bounds[rollout.prompt.task]) for rollout in shaped]
    columns = {
        "length_below": torch.tensor([length < corner.peak_start for length, corner in lengths], dtype=torch.float64),
        "length_above": torch.tensor([length > corner.peak_end for length, corner in lengths], dtype=torch.float64),
    }
    return _by_task(tasks, _means_by_task(tasks, task_ids_of(shaped), columns, process_group)[1])


def group_metrics(
    tasks: Sequence[str], rollouts: Sequence[Rollout], statistics: GroupStatistics, process_group: dist.ProcessGroup
) -> dict[str, float]:
    """``train/zero_variance_groups``, the share of groups without signal, overall and per task. A collective."""
    without = dict(zip(statistics.groups.id.tolist(), statistics.groups.zero_variance.tolist(), strict=True))
    # A group lies on one data-parallel rank: its first response stands for it. One that is left with too few rewards
    # is not among the statistics, and has no signal either.
    groups = [rollout for rollout in rollouts if rollout.sample_index == 0]
    column = torch.tensor([without.get(rollout.group_id, True) for rollout in groups], dtype=torch.float64)
    counts, means = _means_by_task(tasks, task_ids_of(groups), {"zero_variance_groups": column}, process_group)
    everywhere = float(counts.sum())
    overall = (everywhere - float((~statistics.groups.zero_variance).sum())) / everywhere
    return {"train/zero_variance_groups": overall, **_by_task(tasks, means)}


def advantage_metrics(tasks: Sequence[str], diagnostics: AdvantageDiagnostics) -> dict[str, float]:
    """How a task's advantages are distributed: ``train/<task>/advantage_{mean,std,skew,q05,q50,q95}``.

    ``.../advantage_normal_distance`` is their 1-Wasserstein distance from N(0, 1).
    """
    names = ("mean", "std", "skew", "q05", "q50", "q95", "normal_distance")
    return {
        f"train/{tasks[task]}/advantage_{name}": float(getattr(diagnostics, name)[position])
        for position, task in enumerate(diagnostics.task.tolist())
        for name in names
    }


def gap_metrics(
    tasks: Sequence[str], batches: Sequence[PackedBatch], process_group: dist.ProcessGroup
) -> dict[str, float]:
    """How far the rollout engine's log-probabilities are from the trainer's, over response tokens. A collective.

    ``train/rollout_gap_mean``, ``..._max`` and ``..._kl``: mean and largest absolute difference, and KL(behaviour ||
    old), in nats, overall and per task.
    """
    count = len(tasks)
    zeros = torch.zeros(count, dtype=torch.float64)
    total = importance.GapSums(count=zeros, absolute=zeros, kl=zeros, largest=zeros)
    for batch in batches:
        assert batch.old_logprobs is not None
        response = batch.task_ids >= 0
        total = total.merge(
            importance.gap_sums(batch.old_logprobs, batch.behaviour_logprobs, batch.task_ids, response, count)
        )
    sums, largest = torch.stack([total.count, total.absolute, total.kl]), total.largest.clone()
    all_reduce(sums, group=process_group)
    all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    tokens, absolute, divergence = sums
    everywhere = tokens.sum().clamp(min=1.0)
    means = {"rollout_gap_mean": absolute / tokens, "rollout_gap_kl": divergence / tokens}
    present = {**means, "rollout_gap_max": torch.where(tokens > 0, largest, torch.nan)}
    return {
        "train/rollout_gap_mean": float(absolute.sum() / everywhere),
        "train/rollout_gap_kl": float(divergence.sum() / everywhere),
        "train/rollout_gap_max": float(largest.max()),
        **_by_task(tasks, present),
    }


def importance_metrics(
    cap: float | None, batches: Sequence[PackedBatch], process_group: dist.ProcessGroup
) -> dict[str, float]:
    """Shares of the loss's tokens whose importance weight was truncated or is 0 (its sequence masked). A collective."""
    weights = [
        batch.importance_weights[batch.loss_mask != 0] for batch in batches if batch.importance_weights is not None
    ]
    if not weights:
        return {}
    mine = torch.cat(weights)
    truncated = (mine >= cap).sum() if cap is not None else torch.zeros(())
    sums = torch.stack([truncated, (mine == 0).sum(), torch.tensor(len(mine))]).double()
    all_reduce(sums, group=process_group)
    truncated_share, masked_share = (sums[:2] / sums[2].clamp(min=1.0)).tolist()
    return {"train/importance_truncated": truncated_share, "train/importance_masked": masked_share}


def packing_metrics(batches: Sequence[PackedBatch], process_group: dist.ProcessGroup) -> dict[str, float]:
    """How well the step's micro-batches are packed, over the data-parallel ranks. A collective.

    ``train/real_tokens``, the share of their tokens that are no padding, and ``train/micro_batches`` of a rank.
    """
    sums = torch.tensor(
        [sum(int((batch.segment_ids >= 0).sum()) for batch in batches), sum(len(batch.tokens) for batch in batches)],
        dtype=torch.float64,
    )
    all_reduce(sums, group=process_group)
    return {"train/real_tokens": float(sums[0] / sums[1]), "train/micro_batches": float(len(batches))}


def _mean_over(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over those of the step's updates that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _means_by_task(
    tasks: Sequence[str], task_ids: Tensor, columns: Mapping[str, Tensor], process_group: dist.ProcessGroup
) -> tuple[Tensor, dict[str, Tensor]]:
    """How many rollouts each task has over all data-parallel ranks, and the means of its columns. A collective.

    Args:
        tasks: task names in the order of their ids.
        task_ids: int64 ``[N]``, task of each of this rank's rollouts.
        columns: name -> float64 ``[N]``.
        process_group: the data-parallel ranks.

    Returns:
        float64 ``[T]``, and name -> float64 ``[T]``, NaN for a task without rollouts.
    """
    table = torch.stack([torch.ones(len(task_ids), dtype=torch.float64), *columns.values()], dim=1)
    sums = torch.zeros(len(tasks), table.shape[1], dtype=torch.float64).index_add_(0, task_ids, table)
    all_reduce(sums, group=process_group)
    return sums[:, 0], {name: sums[:, column] / sums[:, 0] for column, name in enumerate(columns, start=1)}


def _by_task(tasks: Sequence[str], means: Mapping[str, Tensor]) -> dict[str, float]:
    """``train/<task>/<name>`` of each ``[T]`` column; nothing where it is NaN."""
    return {
        f"train/{task}/{name}": float(value)
        for name, column in means.items()
        for task, value in zip(tasks, column, strict=True)
        if not value.isnan()
    }
