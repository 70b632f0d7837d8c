# SPDX-License-Identifier: Apache-2.0
"""The G2RPO loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.step.advantages import advantages_of
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies
from megatron_g2rpo.train.step.metrics import (
    advantage_metrics,
    answer_warnings,
    entropy_metrics,
    gap_metrics,
    gap_warnings,
    group_metrics,
    importance_metrics,
    length_metrics,
    mean_over,
    packing_metrics,
    rollout_metrics,
    skipped_metrics,
    task_gradient_metrics,
)
from megatron_g2rpo.train.step.minibatches import Minibatch, minibatches
from megatron_g2rpo.train.step.old_logprobs import entropies_of, measured, reference_kl
from megatron_g2rpo.train.step.sampling import collect
from megatron_g2rpo.train.step.timers import Timers

COLUMNS = (
    Column("reward", "train/reward"),
    Column("accuracy", "train/accuracy"),
    Column("format", "train/format"),
    Column("tokens", "train/response_tokens", ".1f"),
    Column("entropy", "train/entropy"),
    Column("loss", "train/loss", ".4f"),
    Column("grad", "train/grad_norm"),
    Column("kl", "train/kl", ".4f"),
    Column("s/step", "time/step", ".2f"),
    Column("val", "val/mean_reward"),
    Column("greedy", "val/mean_greedy_reward"),
)


def train(recipe: TrainRecipe) -> Path | None:
    """Run G2RPO to its end, resuming the run directory's newest checkpoint.

    Returns:
        The exported Hugging Face directory, if the recipe asks for one.
    """
    parts = assemble(recipe)
    run = Run(recipe, parts)
    with MetricsLog(recipe, COLUMNS, run.last_step, run.first_step, enabled=dist.get_rank() == 0) as log:
        start = run.starting_validation(log)
        if start:
            log.log(StepMetrics(step=0, values=start))
        for step in run.steps:
            with run.sampling(step):
                values = g2rpo_step(recipe, parts, step, log.note)
            for warning in gap_warnings(recipe, values):
                log.note(warning)
            run.complete(step, log, values)
        return run.finish()


def g2rpo_step(
    recipe: TrainRecipe, parts: Components, step: int, note: Callable[[str], None] = print
) -> dict[str, float]:
    """One step: sample, score, and update the policy on the advantages; its metrics.

    Args:
        step: of the run.
        note: shows the user a line.
    """
    timers, skipped = Timers(parts), parts.stream.num_skipped
    collected = collect(recipe, parts, step, timers)
    rollouts, rewards = collected.rollouts, collected.rewards
    for warning in answer_warnings(rollouts, recipe.env, recipe.data.response_format, parts.policy.groups.data):
        note(warning)
    with timers("logprobs"):  # of every minibatch before the first update: the policy that sampled
        batches, entropies = measured(recipe, parts, minibatches(recipe, parts, rollouts))
    with timers("rewards"):
        options = recipe.loss_fn.reference_policy_kl
        if parts.reference is not None and options.where == "reward":
            rewards = rewards.plus("reference_kl_sum", reference_kl(recipe, batches), -options.penalty)
        advantages = advantages_of(recipe, parts, rollouts, rewards)
        batches = [minibatch.with_advantages(advantages.values) for minibatch in batches]
    updates = [
        update(recipe, parts, step, number, minibatch, entropy, timers)
        for number, (minibatch, entropy) in enumerate(zip(batches, entropies, strict=True))
    ]
    rows = [row for minibatch in batches for row in minibatch.micro_batches]
    return {
        **rollout_metrics(parts, rollouts, rewards),
        **length_metrics(recipe, parts, rollouts),
        **group_metrics(parts, rollouts, advantages.statistics),
        **advantage_metrics(parts, advantages.diagnostics),
        **mean_over(updates),
        **gap_metrics(parts, rows),
        **importance_metrics(recipe, rows, parts.policy.groups.data),
        **packing_metrics(rows, parts.policy.groups.data),
        **collected.metrics,
        **skipped_metrics(parts, skipped),
        **timers.metrics(),
    }


def update(
    recipe: TrainRecipe,
    parts: Components,
    step: int,
    number: int,
    minibatch: Minibatch,
    entropies: TaskEntropies,
    timers: Timers,
) -> dict[str, float]:
    """One optimizer step; its metrics.

    Args:
        step: of the run.
        number: of the update in the step, from 0.
        minibatch: with advantages.
        entropies: of the minibatch under the policy that sampled it.
    """
    policy, temperature = parts.policy, recipe.policy.generation.temperature
    shaping, metrics = recipe.loss_fn.entropy_shaping, {}
    with timers("logprobs"):
        if number > 0 and shaping.enabled and shaping.sides == "fresh":
            entropies = entropies_of(recipe, parts, minibatch)
    loss = G2RPOLoss(recipe, parts.tasks, entropies, policy.groups.context)
    period = recipe.grpo.task_gradient_period
    if number == 0 and period > 0 and step % period == 0:
        with timers("task_gradients"):
            metrics = task_gradient_metrics(parts, minibatch.micro_batches, loss, entropies, temperature)
    with timers("update"):
        means = loss.metrics(policy.update(minibatch.micro_batches, loss, temperature))
    return {
        **{f"train/{name}": value for name, value in means.items()},
        **entropy_metrics(parts, entropies, loss),
        **metrics,
    }
