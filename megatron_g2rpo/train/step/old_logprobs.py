# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a step's tokens before its first update: under the old policy and the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.objective import importance, kl
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.recipe.loss_section import ImportanceSampling, LossFn
from megatron_g2rpo.train.step.losses import TaskEntropies, sequences_of
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import PackedBatch


def add_logprobs(
    policy: MegatronPolicy,
    reference: ReferencePolicy | None,
    minibatches: Sequence[Minibatch],
    options: ImportanceSampling,
    *,
    temperature: float,
    num_tasks: int,
) -> tuple[list[Minibatch], list[TaskEntropies]]:
    """Add old and reference log-probabilities and importance weights to the micro-batches. A collective of all ranks.

    Old log-probabilities are recomputed by the trainer, before the step's first update, and not those that the engine
    reported: the surrogate's ratio is then exactly 1 at the first update, whatever engine sampled.

    Args:
        policy: the trainer, with the weights that sampled.
        reference: the reference policy, or None where nothing measures the distance from it.
        minibatches: the step's minibatches.
        options: the recipe's ``loss_fn.importance_sampling``.
        temperature: temperature at which the rollouts were sampled.
        num_tasks: number of tasks that the recipe lists.

    Returns:
        The minibatches with what was added, and the task entropies of each under the old policy.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch.micro_batches]
    stats = policy.logprobs(batches, temperature)
    batches = [
        replace(
            batch,
            old_logprobs=stat.logprobs,
            importance_weights=importance_weights(options, batch, stat.logprobs),
        )
        for batch, stat in zip(batches, stats, strict=True)
    ]
    if reference is not None:
        theirs = reference.logprobs(batches, temperature)
        batches = [
            replace(batch, reference_logprobs=stat.logprobs) for batch, stat in zip(batches, theirs, strict=True)
        ]
    complete: list[Minibatch] = []
    entropies: list[TaskEntropies] = []
    first = 0
    for minibatch in minibatches:
        mine = slice(first, first + len(minibatch.micro_batches))
        first = mine.stop
        complete.append(replace(minibatch, micro_batches=batches[mine]))
        entropies.append(TaskEntropies.of(batches[mine], stats[mine], num_tasks, policy.groups.data))
    return complete, entropies


def entropies_of(policy: MegatronPolicy, minibatch: Minibatch, *, temperature: float, num_tasks: int) -> TaskEntropies:
    """Task entropies of a minibatch under the current policy. A collective of all ranks."""
    stats = policy.logprobs(minibatch.micro_batches, temperature)
    return TaskEntropies.of(minibatch.micro_batches, stats, num_tasks, policy.groups.data)


def importance_weights(options: ImportanceSampling, batch: PackedBatch, old_logprobs: Tensor) -> Tensor | None:
    """Factor of each token's loss that corrects for the gap, float32 ``[S]``; None where the recipe asks for none.

    Args:
        options: the recipe's ``loss_fn.importance_sampling``.
        batch: a whole micro-batch, with the behaviour policy's log-probabilities.
        old_logprobs: float32 ``[S]``, the old policy's log-probabilities of the same tokens.
    """
    low, high = options.sequence_ratio_min, options.sequence_ratio_max
    if options.truncated_ratio is None and low is None and high is None:
        return None
    weights = torch.ones_like(old_logprobs)
    if options.truncated_ratio is not None:
        weights = importance.truncated_weights(old_logprobs, batch.behaviour_logprobs, cap=options.truncated_ratio)
    if low is not None or high is not None:
        weights = weights * importance.sequences_within(
            old_logprobs,
            batch.behaviour_logprobs,
            sequences_of(batch),
            low=0.0 if low is None else low,
            high=torch.inf if high is None else high,
        )
    return weights


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
