# SPDX-License-Identifier: Apache-2.0
"""Validation: every held-out prompt answered twice, sampled and greedily, and scored per task."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.recipe.validation_metrics import OF_REWARDS
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.run.examples import Example, first_of_each_task
from megatron_g2rpo.train.step.generation import answers_both_ways
from megatron_g2rpo.train.step.rewards import scored, scoring_of
from megatron_g2rpo.train.step.warnings import answer_warnings
from megatron_g2rpo.types import Rewards, Rollout, task_ids_of

# The same draws at every validation of a run and in every run: what changes between two is the policy.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Validation:
    """Result of one validation.

    Attributes:
        metrics: ``val/<task>/{reward,accuracy,format,response_tokens}``, of greedy responses with ``greedy_`` before
            the name, and ``val/mean_reward``, ``val/mean_greedy_reward``, ``val/mean_accuracy``...: means over tasks of
            equal weight. ``accuracy`` and ``format`` are there where the recipe weighs them. ``val/skipped_samples``
            and ``val/skipped/<reason>`` count what was left out, if anything was (``data.on_bad_sample: skip``).
        examples: answers of all ranks, the first sampled and the first greedy one of each task.
        warnings: lines about greedy responses without an answer.
        failures: lines about rewards that could not be computed.
    """

    metrics: dict[str, float]
    examples: list[Example]
    warnings: list[str]
    failures: list[str]


def validate(recipe: Recipe, components: Components) -> Validation:
    """Validate the engine's current weights. A collective of all ranks, each of which answers its share.

    Raises:
        EngineUnavailable: the engine was lost, see ``answers``.
        SamplingStopped: the run was asked to stop, see ``answers``.
    """
    metrics: dict[str, float] = {}
    examples: list[Example] = []
    warnings: list[str] = []
    failures: list[str] = []
    prompts = components.validation
    both = answers_both_ways(
        components.engine,
        components.policy,
        prompts,
        sampling=Sampling.of_validation(recipe.policy.generation),
        seed=VALIDATION_SEED,
        stopping=components.stopping,
    )
    for prefix, rollouts in zip(("", "greedy_"), both, strict=True):
        rewards, failed = scored(scoring_of(recipe, components.workers), rollouts, replica=None, between=None)
        metrics.update(_task_means(components.tasks, rollouts, rewards, prefix))
        metrics.update(failed.metrics(f"val/{prefix}failed_rewards"))
        failures += failed.lines("the means of the validation leave them out")
        examples += first_of_each_task(rollouts, rewards, "greedy" if prefix else "sampled")
        if prefix:
            warnings = answer_warnings(rollouts, recipe.env, recipe.data.response_format, None)
    if components.left_out:
        metrics["val/skipped_samples"] = float(sum(components.left_out.values()))
        metrics.update({f"val/skipped/{reason}": float(n) for reason, n in sorted(components.left_out.items())})
    return Validation(metrics=metrics, examples=examples, warnings=warnings, failures=failures)


def _task_means(tasks: tuple[str, ...], rollouts: list[Rollout], rewards: Rewards, prefix: str) -> dict[str, float]:
    """Means over the rollouts of all ranks that have a reward, by task and over tasks. A collective of all ranks."""
    rows = (~rewards.failed).nonzero().flatten()
    rollouts, rewards = [rollouts[index] for index in rows.tolist()], rewards[rows]
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts], dtype=torch.float64)
    truncated = torch.tensor([rollout.truncated for rollout in rollouts], dtype=torch.float64)
    columns = {
        "reward": rewards.total,
        **{name: rewards.parts[name] for name in OF_REWARDS if name in rewards.parts},
        "response_tokens": lengths,
        "truncated": truncated,
    }
    table = torch.stack([torch.ones_like(lengths), *columns.values()], dim=1)
    sums = torch.zeros(len(tasks), table.shape[1], dtype=torch.float64).index_add_(0, task_ids_of(rollouts), table)
    all_reduce(sums)
    metrics: dict[str, float] = {}
    present = [index for index in range(len(tasks)) if sums[index, 0] > 0]
    for column, name in enumerate(columns, start=1):
        means = {tasks[index]: float(sums[index, column] / sums[index, 0]) for index in present}
        metrics.update({f"val/{task}/{prefix}{name}": mean for task, mean in means.items()})
        if means:
            metrics[f"val/mean_{prefix}{name}"] = sum(means.values()) / len(means)
    return metrics
