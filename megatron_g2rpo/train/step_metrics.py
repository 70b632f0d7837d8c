# SPDX-License-Identifier: Apache-2.0
"""The numbers of a G2RPO step: rewards per part and task, the objective's health, the rollout gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.nouns import PackedBatch, Rewards, Rollout
from megatron_g2rpo.objective import GroupStatistics
from megatron_g2rpo.train.assembly import Assembly
from megatron_g2rpo.train.losses import TaskEntropies


def skipped_metrics(parts: Assembly, before: int) -> dict[str, float]:
    """``train/skipped_samples``: bad samples that the step replaced (``data.on_bad_sample: skip``). A collective.

    Args:
        before: ``parts.stream.num_skipped`` at the start of the step.
    """
    skipped = torch.tensor([parts.stream.num_skipped - before])
    dist.all_reduce(skipped, group=parts.policy.groups.data)
    return {"train/skipped_samples": float(skipped)}


def rollout_metrics(
    parts: Assembly, rollouts: Sequence[Rollout], rewards: Rewards, statistics: GroupStatistics
) -> dict[str, float]:
    """Means over the global batch, overall and per task: ``train/reward``, ``train/<task>/accuracy``... A collective.

    Also ``train/zero_variance_groups``, the share of groups without signal.
    """
    columns = {
        "reward": rewards.total,
        **rewards.parts,
        "response_tokens": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.float64),
        "truncated": torch.tensor([r.truncated for r in rollouts], dtype=torch.float64),
    }
    tasks = torch.tensor([parts.task_id(r.prompt.task) for r in rollouts], dtype=torch.int64)
    table = torch.stack([torch.ones(len(rollouts), dtype=torch.float64), *columns.values()], dim=1)
    sums = torch.zeros(len(parts.tasks), table.shape[1], dtype=torch.float64).index_add_(0, tasks, table)
    dist.all_reduce(sums, group=parts.policy.groups.data)
    metrics = {}
    for column, name in enumerate(columns, start=1):
        metrics[f"train/{name}"] = float(sums[:, column].sum() / sums[:, 0].sum())
        for index, task in enumerate(parts.tasks):
            if sums[index, 0] > 0:
                metrics[f"train/{task}/{name}"] = float(sums[index, column] / sums[index, 0])
    metrics["train/zero_variance_groups"] = float(statistics.groups.zero_variance.double().mean())
    return metrics


def entropy_metrics(parts: Assembly, entropies: TaskEntropies, hinge: float) -> dict[str, float]:
    """Mean entropy of each task before the update, in nats, and the value of the entropy term."""
    means = {
        f"train/{task}/entropy": float(mean)
        for task, mean, count in zip(parts.tasks, entropies.mean, entropies.counts, strict=True)
        if count > 0
    }
    return {**means, "train/entropy_loss": hinge}


def gap_metrics(batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> dict[str, float]:
    """How far the rollout engine's log-probabilities are from the trainer's, over response tokens. A collective.

    ``train/rollout_gap_mean`` and ``..._max``: mean and largest absolute difference, in nats.
    """
    differences = torch.cat(
        [
            (batch.rollout_logprobs - batch.behaviour_logprobs)[batch.task_ids >= 0].abs()
            for batch in batches
            if batch.behaviour_logprobs is not None
        ]
    ).double()
    sums = torch.tensor([differences.sum(), differences.numel()], dtype=torch.float64)
    largest: Tensor = differences.max() if differences.numel() else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return {
        "train/rollout_gap_mean": float(sums[0] / sums[1].clamp(min=1.0)),
        "train/rollout_gap_max": float(largest),
    }


def packing_metrics(batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> dict[str, float]:
    """How well the step's micro-batches are packed, over all ranks. A collective.

    ``train/real_tokens``, the share of their tokens that are no padding, and ``train/micro_batches`` of a rank.
    """
    sums = torch.tensor(
        [sum(int((batch.segment_ids >= 0).sum()) for batch in batches), sum(len(batch.tokens) for batch in batches)],
        dtype=torch.float64,
    )
    dist.all_reduce(sums, group=group)
    return {"train/real_tokens": float(sums[0] / sums[1]), "train/micro_batches": float(len(batches))}


def mean_over(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over those of the step's updates that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
