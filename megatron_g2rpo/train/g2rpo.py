# SPDX-License-Identifier: Apache-2.0
"""The G2RPO loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.nouns import PackedBatch
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.tasks import rewards as task_rewards
from megatron_g2rpo.train.advantages import advantages_of, estimator_of
from megatron_g2rpo.train.assembly import Assembly, assemble
from megatron_g2rpo.train.loop import Run, Timers
from megatron_g2rpo.train.losses import G2RPOLoss, TaskEntropies
from megatron_g2rpo.train.metrics import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.minibatches import check_lengths, minibatches, owned_rows
from megatron_g2rpo.train.rollouts import generate
from megatron_g2rpo.train.step_metrics import (
    entropy_metrics,
    gap_metrics,
    mean_over,
    packing_metrics,
    rollout_metrics,
    skipped_metrics,
)

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
    estimator_of(recipe)  # an unknown name is an error now, not after the first rollouts
    parts = assemble(recipe)
    run = Run(recipe, parts)
    with MetricsLog(recipe, COLUMNS, run.last_step, run.first_step, enabled=dist.get_rank() == 0) as log:
        start = run.starting_validation(log)
        if start:
            log.log(StepMetrics(step=0, values=start))
        for step in run.steps:
            values = g2rpo_step(recipe, parts, step)
            log.log(StepMetrics(step=step, values={**values, **run.validation(step, log)}))
            run.save(step)
        return run.finish()


def g2rpo_step(recipe: TrainRecipe, parts: Assembly, step: int) -> dict[str, float]:
    """One step: sample, score, and update the policy on the advantages; its metrics."""
    timers, policy, generation = Timers(parts), parts.policy, recipe.policy.generation
    owned, skipped = owned_rows(recipe.grpo.num_prompts_per_step, policy.groups), parts.stream.num_skipped
    with timers("data"):
        prompts = parts.stream.next_batch(recipe.grpo.num_prompts_per_step, owned)
        check_lengths(recipe, prompts)
    with timers("generation"):
        parts.engine.load_weights(policy.stream())
        rollouts = generate(
            parts.engine,
            policy.groups,
            prompts,
            recipe.grpo.num_generations_per_prompt,
            temperature=generation.temperature,
            seed=sampling_seed(recipe.grpo.seed, step),
            group_ids=list(owned),
        )
    with timers("rewards"):
        rewards = task_rewards.score(rollouts, recipe.env)
        advantages, statistics = advantages_of(recipe, parts, rollouts, rewards)
        batches = minibatches(recipe, parts, rollouts, advantages)
    with timers("logprobs"):  # of every minibatch before the first update: the policy that sampled
        measured = [with_behaviour(parts, batch, generation.temperature) for batch in batches]
    updates = []
    for minibatch, entropies in measured:
        with timers("update"):
            loss = G2RPOLoss(recipe, parts.tasks, entropies)
            metrics = policy.update(minibatch, loss, generation.temperature)
        updates.append(
            {
                **{f"train/{name}": value for name, value in metrics.items()},
                **entropy_metrics(parts, entropies, loss.hinge),
            }
        )
    rows = [row for minibatch, _ in measured for row in minibatch]
    return {
        **rollout_metrics(parts, rollouts, rewards, statistics),
        **mean_over(updates),
        **gap_metrics(rows, policy.groups.data),
        **packing_metrics(rows, policy.groups.data),
        **skipped_metrics(parts, skipped),
        **timers.metrics(),
    }


def with_behaviour(
    parts: Assembly, batches: list[PackedBatch], temperature: float
) -> tuple[list[PackedBatch], TaskEntropies]:
    """The minibatch with the policy's own log-probabilities as behaviour, and its entropy per task. A collective."""
    stats = parts.policy.logprobs(batches, temperature)
    entropies = TaskEntropies.of(batches, stats, len(parts.tasks), parts.policy.groups.data)
    return [replace(b, behaviour_logprobs=s.logprobs) for b, s in zip(batches, stats, strict=True)], entropies


def sampling_seed(seed: int, step: int) -> int:
    """Seed of a step's draws; the engine tells prompts and samples apart itself."""
    return seed * 1_000_003 + step
