# SPDX-License-Identifier: Apache-2.0
"""G2RPO, on one screen: ``train`` is the run, ``g2rpo_step`` the algorithm, ``update`` one optimizer step.

    megatron-g2rpo train examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml [key=value ...]

A step, and where each part of it is:

1. give the engine the policy's weights, draw prompts, sample a group of responses to each and score them
   (``step/sampling.py``, which asks ``rollout/`` and ``tasks/``);
2. pack the rollouts into minibatches of micro-batches (``step/minibatches.py``), and recompute with the trainer, before
   it moves, the log-probabilities that its first update does not compute anyway (``step/old_logprobs.py``);
3. turn rewards into advantages, within groups and tasks (``step/advantages.py``; the mathematics is ``objective/``);
4. take one optimizer step per minibatch on surrogate, KL term and entropy shaping (``step/losses.py``; ``policy/``).

What it simplifies:

- Sampling and training take turns, and weights are synced before every sampling: a step is on-policy, nothing is stale,
  and there is no queue or replay buffer between the two.
- A reward is a weighted sum of functions of the response (``tasks/``), and an advantage is one number a rollout: there
  is no critic. A rollout is a single turn, without tools.
- Every rank runs this file, under torchrun: there is no controller process, and the only state beside the policy and
  its optimizer is the position in the data and what the estimator remembers. Around the steps, ``run/`` validates,
  logs, saves and resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.recipe.old_logprobs import needs_entropies_first, takes_fresh_sides
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.run.logs import Column, StepMetrics
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.step.advantages import advantages_of
from megatron_g2rpo.train.step.bad_updates import rollout_records
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, entropy_bounds
from megatron_g2rpo.train.step.metrics import memory_metrics, skipped_metrics, step_metrics
from megatron_g2rpo.train.step.minibatches import Minibatch, pack_minibatches
from megatron_g2rpo.train.step.old_logprobs import add_logprobs, entropies_of, reference_kl, with_old_logprobs
from megatron_g2rpo.train.step.recording import REFERENCE_KL, Recording, recording_of
from megatron_g2rpo.train.step.sampling import Collected, collect
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.train.step.update_metrics import task_gradient_metrics, update_metrics
from megatron_g2rpo.train.step.warnings import SignalWatch, answer_warnings, gap_warnings
from megatron_g2rpo.train.step.work import WorkMeter, work_metrics
from megatron_g2rpo.types import TokenStats

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


def train(recipe: TrainRecipe, *, quiet: bool = False) -> Path | None:
    """Run G2RPO to its end, resuming the run directory's newest checkpoint.

    Args:
        recipe: the run's recipe.
        quiet: whether the console shows warnings alone.

    Returns:
        The exported Hugging Face directory, if the recipe asks for one.

    Raises:
        RunStopped: a signal or a deadline ended it before its last step.
    """
    with assemble(recipe) as components:
        run, without_signal = Run(recipe, components), SignalWatch()
        with run.log(columns_of(recipe), quiet=quiet) as log, run.naming_checkpoints(log):
            recording = recording_of(recipe, components, run.first_step, log.note)
            run.begin(log)
            for step in run.steps:
                with run.sampling(step), run.profiled(step):
                    metrics = g2rpo_step(recipe, components, step, log.note, recording=recording)
                gaps = gap_warnings(recipe.policy.generation.gap_warning, tuple(recipe.env.tasks), metrics)
                for warning in (*gaps, *without_signal(step, metrics)):
                    log.note(warning)
                metrics |= run.validation(step, log, metrics)
                log.log(StepMetrics(step=step, values=metrics))
                run.save(step)
                run.stop_if_asked(step)
            return run.finish()


def columns_of(recipe: TrainRecipe) -> tuple[Column, ...]:
    """Return the columns of the console table; where a penalty is at work, the distance that it is on is one."""
    divergence = recipe.loss_fn.reference_policy_kl
    if divergence.penalty == 0.0:
        return COLUMNS
    metric = "train/reference_kl" if divergence.where == "loss" else "train/reference_kl_sum"
    place = [column.heading for column in COLUMNS].index("kl") + 1
    return (*COLUMNS[:place], Column("ref-kl", metric, ".4f"), *COLUMNS[place:])


def g2rpo_step(
    recipe: TrainRecipe,
    components: Components,
    step: int,
    note: Callable[[str], None] = print,
    *,
    sample: Callable[[TrainRecipe, Components, int, Timers], Collected] = collect,
    recording: Recording | None = None,
) -> dict[str, float]:
    """Take one step: sample, score, and update the policy on the advantages. A collective of all ranks.

    Args:
        recipe: the run's recipe.
        components: what the loop works with.
        step: number of the step, from 1.
        note: shows the user a line.
        sample: gives the step's rollouts and their rewards; a replay takes them from a record.
        recording: keeps the rollouts on disk; None: nothing does.

    Returns:
        The metrics of the step.
    """
    policy, reference, timers = components.policy, components.reference, Timers(components.device)
    loss_fn, data_parallel, skipped = recipe.loss_fn, policy.groups.data, components.stream.skipped.copy()
    meter = WorkMeter(policy)
    if policy.vision_cache is not None:
        policy.vision_cache.begin_step()

    collected = sample(recipe, components, step, timers)
    rollouts, rewards = collected.rollouts, collected.rewards
    if recording is not None:
        with timers("record"):
            recording.begin(step, rollouts, rewards, timers.seconds["generation"])
    for warning in answer_warnings(rollouts, recipe.env, recipe.data.response_format, data_parallel):
        note(warning)
    for line in collected.failed.lines("their rollouts are left out of loss and group"):
        note(line)

    with timers("logprobs"):  # before the first update: of the policy that sampled
        minibatches = pack_minibatches(
            recipe.grpo, recipe.policy, components.packer, rollouts, rewards.failed,
            token_level_loss=loss_fn.token_level_loss, process_group=data_parallel,
        )  # fmt: skip
        minibatches, entropies = add_logprobs(recipe, policy, reference, minibatches, num_tasks=len(components.tasks))

    with timers("rewards"):
        divergence = loss_fn.reference_policy_kl
        if reference is not None and divergence.where == "reward":
            rewards = rewards.plus(REFERENCE_KL, reference_kl(loss_fn, minibatches), -divergence.penalty)
        advantages = advantages_of(
            recipe.grpo.adv_estimator, rollouts, rewards, history=components.history, process_group=data_parallel
        )
        minibatches = [minibatch.with_advantages(advantages.values) for minibatch in minibatches]

    updates: list[dict[str, float]] = []
    for number, minibatch in enumerate(minibatches):
        metrics, minibatches[number] = update(recipe, components, step, number, minibatch, entropies[number], timers)
        updates.append(metrics)
        batch = partial(rollout_records, rollouts, rewards, minibatch.rollouts.tolist())
        components.guard.settle(step, number, batch, group=data_parallel, note=note)
    if recording is not None:
        with timers("record"):
            recording.finish(rewards, advantages.values, minibatches)
    metrics = step_metrics(
        components.tasks, rollouts, rewards, advantages, minibatches, updates,
        env=recipe.env, truncated_ratio=loss_fn.importance_sampling.truncated_ratio, process_group=data_parallel,
    )  # fmt: skip
    metrics["train/skipped_updates"] = sum(update["train/skipped_updates"] for update in updates)
    metrics |= collected.metrics | collected.failed.metrics("train/failed_rewards")
    metrics |= skipped_metrics(components.stream.skipped - skipped)
    metrics |= work_metrics(meter, policy, timers.seconds, sum(rollout.num_tokens for rollout in rollouts))
    return {**metrics, **timers.metrics(), **memory_metrics(components.device)}


def update(
    recipe: TrainRecipe,
    components: Components,
    step: int,
    number: int,
    minibatch: Minibatch,
    entropies: TaskEntropies | None,
    timers: Timers,
) -> tuple[dict[str, float], Minibatch]:
    """Take one optimizer step. A collective of all ranks.

    Args:
        recipe: the run's recipe.
        components: what the loop works with.
        step: number of the step, from 1.
        number: number of the update in the step, from 0.
        minibatch: the rollouts of the update, with advantages.
        entropies: task entropies of the minibatch under the policy that sampled it; None where its old
            log-probabilities are the update's own.
        timers: the step's stopwatch.

    Returns:
        The metrics of the update, and the minibatch with old log-probabilities.
    """
    policy, tasks, groups = components.policy, components.tasks, components.policy.groups
    batches, temperature = minibatch.micro_batches, recipe.policy.generation.temperature
    period, gradients = recipe.grpo.task_gradient_period, {}
    if takes_fresh_sides(recipe, update=number):
        entropies = None
        if needs_entropies_first(recipe, micro_batches=len(batches)):
            with timers("logprobs"):
                entropies = entropies_of(policy, minibatch, temperature=temperature, num_tasks=len(tasks))
    loss = G2RPOLoss(
        recipe.loss_fn, entropy_bounds(recipe.env, tasks), tasks, entropies, groups.context, groups.data_context
    )
    if number == 0 and period > 0 and step % period == 0:
        with timers("task_gradients"):
            gradients = task_gradient_metrics(policy, tasks, batches, loss, temperature=temperature)
    stats: list[TokenStats] = []
    own = stats.extend if entropies is None else None
    with timers("update"):
        means = policy.update(batches, loss, temperature, skips=components.guard.skips, on_stats=own)
    if entropies is None:
        entropies = TaskEntropies.of(batches, stats, len(tasks), groups.data)
        loss = loss.with_entropies(entropies)
    if any(batch.old_logprobs is None for batch in batches):
        minibatch = with_old_logprobs(recipe, minibatch, stats)
    return {**update_metrics(tasks, means, entropies, loss), **gradients}, minibatch
