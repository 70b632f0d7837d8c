# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a step's tokens before its first update: under the old policy and the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.objective import kl
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.recipe.loss_section import LossFn
from megatron_g2rpo.recipe.old_logprobs import needs_old_logprobs
from megatron_g2rpo.train.step.importance import importance_weights
from megatron_g2rpo.train.step.losses import TaskEntropies
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import TokenStats


def add_logprobs(
    recipe: TrainRecipe,
    policy: MegatronPolicy,
    reference: ReferencePolicy | None,
    minibatches: Sequence[Minibatch],
    *,
    num_tasks: int,
) -> tuple[list[Minibatch], list[TaskEntropies | None]]:
    """Add old and reference log-probabilities and importance weights to the micro-batches. A collective of all ranks.

    Old log-probabilities are the trainer's, and not those that the engine reported: the surrogate's ratio is then
    exactly 1 at the first update, whatever engine sampled. They are computed by a pass of their own only for the
    minibatches that need them before their update (``recipe.old_logprobs``); see ``with_old_logprobs`` for the others.

    Args:
        recipe: the run's recipe.
        policy: the trainer, with the weights that sampled.
        reference: the reference policy, or None where nothing measures the distance from it.
        minibatches: the step's minibatches.
        num_tasks: number of tasks that the recipe lists.

    Returns:
        The minibatches with what was added, and the task entropies of each under the old policy; None of one whose old
        log-probabilities are its update's.
    """
    temperature = recipe.policy.generation.temperature
    needed = [
        needs_old_logprobs(recipe, update=number, micro_batches=len(minibatch.micro_batches))
        for number, minibatch in enumerate(minibatches)
    ]
    asked = [minibatch for minibatch, need in zip(minibatches, needed, strict=True) if need]
    batches = [batch for minibatch in asked for batch in minibatch.micro_batches]
    stats = iter(policy.logprobs(batches, temperature) if batches else [])
    complete: list[Minibatch] = []
    entropies: list[TaskEntropies | None] = []
    for minibatch, need in zip(minibatches, needed, strict=True):
        if not need:
            complete.append(minibatch)
            entropies.append(None)
            continue
        theirs = list(islice(stats, len(minibatch.micro_batches)))
        complete.append(with_old_logprobs(recipe, minibatch, theirs))
        entropies.append(TaskEntropies.of(minibatch.micro_batches, theirs, num_tasks, policy.groups.data))
    if reference is not None:
        complete = _with_reference(reference, complete, temperature)
    return complete, entropies


def with_old_logprobs(recipe: TrainRecipe, minibatch: Minibatch, stats: Sequence[TokenStats]) -> Minibatch:
    """Return a minibatch with old log-probabilities, entropies and importance weights.

    Args:
        recipe: the run's recipe.
        minibatch: the minibatch.
        stats: the statistics of its micro-batches under the old policy: those of ``policy.logprobs``, or for the step's
            first minibatch those of its update's own forward pass.
    """
    options = recipe.loss_fn.importance_sampling
    batches = [
        replace(
            batch,
            old_logprobs=stat.logprobs,
            importance_weights=importance_weights(options, batch, stat.logprobs),
        )
        for batch, stat in zip(minibatch.micro_batches, stats, strict=True)
    ]
    return replace(minibatch, micro_batches=batches, entropies=[stat.entropy for stat in stats])


def _with_reference(
    reference: ReferencePolicy, minibatches: Sequence[Minibatch], temperature: float
) -> list[Minibatch]:
    stats = iter(
        reference.logprobs([batch for minibatch in minibatches for batch in minibatch.micro_batches], temperature)
    )
    return [
        replace(
            minibatch,
            micro_batches=[
                replace(batch, reference_logprobs=next(stats).logprobs) for batch in minibatch.micro_batches
            ],
        )
        for minibatch in minibatches
    ]


def entropies_of(policy: MegatronPolicy, minibatch: Minibatch, *, temperature: float, num_tasks: int) -> TaskEntropies:
    """Task entropies of a minibatch under the current policy. A collective of all ranks."""
    stats = policy.logprobs(minibatch.micro_batches, temperature)
    return TaskEntropies.of(minibatch.micro_batches, stats, num_tasks, policy.groups.data)


def reference_kl(options: LossFn, minibatches: Sequence[Minibatch]) -> Tensor:
    """Divergence of the old policy from the reference policy on each rollout, summed over its tokens.

    Args:
        options: the recipe's ``loss_fn``, for the kind of divergence and the clamp of the log-ratio.
        minibatches: this rank's minibatches, with old and reference log-probabilities.

    Returns:
        float64 ``[N]``, nats, in the order of this rank's rollouts of the step.
    """
    sums = torch.zeros(sum(len(minibatch.rollouts) for minibatch in minibatches), dtype=torch.float64)
    for minibatch in minibatches:
        for batch in minibatch.micro_batches:
            assert batch.old_logprobs is not None
            assert batch.reference_logprobs is not None
            divergence = kl.penalty(
                options.reference_policy_kl.kind,
                batch.old_logprobs,
                batch.reference_logprobs,
                log_ratio_clamp=options.log_ratio_clamp,
            )
            for index, values in response_values(batch, divergence).items():
                sums[minibatch.rollouts[index]] = values.double().sum()
    return sums
