# SPDX-License-Identifier: Apache-2.0
"""What is measured of a step's rows before its first update, under the policy that sampled them and under others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.objective import importance, kl
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.step.losses import TaskEntropies, sequences_of
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import PackedBatch


def measured(
    recipe: TrainRecipe, parts: Components, minibatches: Sequence[Minibatch]
) -> tuple[list[Minibatch], list[TaskEntropies]]:
    """The minibatches with log-probabilities and importance weights, and their entropies. A collective.

    Behaviour log-probabilities are the policy's own, recomputed: the surrogate's ratio is then exactly 1 at the first
    update, whatever engine sampled.
    """
    temperature = recipe.policy.generation.temperature
    rows = [row for minibatch in minibatches for row in minibatch.micro_batches]
    stats = parts.policy.logprobs(rows, temperature)
    rows = [
        replace(
            row,
            old_logprobs=stat.logprobs,
            importance_weights=importance_weights(recipe, row, stat.logprobs),
        )
        for row, stat in zip(rows, stats, strict=True)
    ]
    if parts.reference is not None:
        reference = parts.reference.logprobs(rows, temperature)
        rows = [replace(row, reference_logprobs=stat.logprobs) for row, stat in zip(rows, reference, strict=True)]
    complete: list[Minibatch] = []
    entropies: list[TaskEntropies] = []
    first = 0
    for minibatch in minibatches:
        mine = slice(first, first + len(minibatch.micro_batches))
        first = mine.stop
        complete.append(replace(minibatch, micro_batches=rows[mine]))
        entropies.append(TaskEntropies.of(rows[mine], stats[mine], len(parts.tasks), parts.policy.groups.data))
    return complete, entropies


def entropies_of(recipe: TrainRecipe, parts: Components, minibatch: Minibatch) -> TaskEntropies:
    """Entropies of a minibatch under the policy as it is now. A collective."""
    stats = parts.policy.logprobs(minibatch.micro_batches, recipe.policy.generation.temperature)
    return TaskEntropies.of(minibatch.micro_batches, stats, len(parts.tasks), parts.policy.groups.data)


def importance_weights(recipe: TrainRecipe, row: PackedBatch, old_logprobs: Tensor) -> Tensor | None:
    """``loss_fn.importance_sampling``: factor of each token's loss, float32 ``[S]``; None where it asks for nothing."""
    options = recipe.loss_fn.importance_sampling
    low, high = options.sequence_ratio_min, options.sequence_ratio_max
    if options.truncated_ratio is None and low is None and high is None:
        return None
    weights = torch.ones_like(old_logprobs)
    if options.truncated_ratio is not None:
        weights = importance.truncated_weights(old_logprobs, row.behaviour_logprobs, cap=options.truncated_ratio)
    if low is not None or high is not None:
        weights = weights * importance.sequences_within(
            old_logprobs,
            row.behaviour_logprobs,
            sequences_of(row),
            low=0.0 if low is None else low,
            high=torch.inf if high is None else high,
        )
    return weights


def reference_kl(recipe: TrainRecipe, minibatches: Sequence[Minibatch]) -> Tensor:
    """Divergence of each of this rank's rollouts from the reference policy, summed over its tokens: float64 ``[N]``."""
    options = recipe.loss_fn
    sums = torch.zeros(sum(len(minibatch.rollouts) for minibatch in minibatches), dtype=torch.float64)
    for minibatch in minibatches:
        for row in minibatch.micro_batches:
            assert row.old_logprobs is not None
            assert row.reference_logprobs is not None
            divergence = kl.penalty(
                options.reference_policy_kl.kind,
                row.old_logprobs,
                row.reference_logprobs,
                log_ratio_clamp=options.log_ratio_clamp,
            )
            for index, values in response_values(row, divergence).items():
                sums[minibatch.rollouts[index]] = values.double().sum()
    return sums
