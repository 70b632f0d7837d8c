# SPDX-License-Identifier: Apache-2.0
"""Validation: every held-out prompt answered twice, sampled and greedily, and scored per task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.tasks import rewards
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.step.generation import answers
from megatron_g2rpo.types import Rollout

# The same draws at every validation of a run and in every run: what changes between two is the policy.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Validation:
    """Result of one validation.

    Attributes:
        metrics: ``val/<task>/{reward,accuracy,format,response_tokens}``, the same with ``greedy_`` before the name, and
            ``val/mean_reward``, ``val/mean_greedy_reward``, ``val/mean_accuracy``...: means over tasks of equal weight.
        examples: greedy rollouts of this rank, the first of each task.
    """

    metrics: dict[str, float]
    examples: list[Rollout]


def validate(recipe: Recipe, parts: Components) -> Validation:
    """Validate the engine's current weights. A collective of all ranks, each of which answers its share."""
    metrics: dict[str, float] = {}
    examples: list[Rollout] = []
    ids = list(range(len(parts.validation)))
    for prefix, temperature in (("", recipe.policy.generation.val_temperature), ("greedy_", 0.0)):
        rollouts = answers(parts, parts.validation, 1, temperature=temperature, seed=VALIDATION_SEED, group_ids=ids)
        metrics.update(_task_means(recipe, parts, rollouts, prefix))
        if prefix:
            seen: set[str] = set()
            examples = [r for r in rollouts if not (r.prompt.task in seen or seen.add(r.prompt.task))]
    return Validation(metrics=metrics, examples=examples)


def _task_means(recipe: Recipe, parts: Components, rollouts: list[Rollout], prefix: str) -> dict[str, float]:
    scored = rewards.score(rollouts, recipe.env)
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts], dtype=torch.float64)
    truncated = torch.tensor([rollout.truncated for rollout in rollouts], dtype=torch.float64)
    columns = {
        "reward": scored.total,
        "accuracy": scored.parts["accuracy"],
        "format": scored.parts["format"],
        "response_tokens": lengths,
        "truncated": truncated,
    }
    task_ids = torch.tensor([parts.task_id(rollout.prompt.task) for rollout in rollouts], dtype=torch.int64)
    table = torch.stack([torch.ones_like(lengths), *columns.values()], dim=1)
    sums = torch.zeros(len(parts.tasks), table.shape[1], dtype=torch.float64).index_add_(0, task_ids, table)
    dist.all_reduce(sums)
    metrics: dict[str, float] = {}
    present = [index for index in range(len(parts.tasks)) if sums[index, 0] > 0]
    for column, name in enumerate(columns, start=1):
        means = {parts.tasks[index]: float(sums[index, column] / sums[index, 0]) for index in present}
        metrics.update({f"val/{task}/{prefix}{name}": mean for task, mean in means.items()})
        metrics[f"val/mean_{prefix}{name}"] = sum(means.values()) / len(means)
    return metrics
