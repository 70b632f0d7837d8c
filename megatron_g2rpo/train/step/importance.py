# SPDX-License-Identifier: Apache-2.0
"""Weights that correct the loss for the gap between the rollout engine's and the trainer's log-probabilities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.objective import Sequences, importance
from megatron_g2rpo.recipe.loss_section import ImportanceSampling
from megatron_g2rpo.types import PackedBatch


def importance_weights(
    options: ImportanceSampling,
    batch: PackedBatch,
    old_logprobs: Tensor,
    context: dist.ProcessGroup | None = None,
) -> Tensor | None:
    """Factor of each token's loss that corrects for the gap, float32 ``[S]``; None where the recipe asks for none.

    A collective of ``context`` where sequences are masked.

    Args:
        options: the recipe's ``loss_fn.importance_sampling``.
        batch: a micro-batch, or a context-parallel rank's share of one, with the behaviour policy's log-probabilities.
        old_logprobs: float32 ``[S]``, the old policy's log-probabilities of the same tokens.
        context: process group of the ranks with the other shares; None for a whole micro-batch.
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
            sequences_of(batch, context),
            low=0.0 if low is None else low,
            high=torch.inf if high is None else high,
        )
    return weights


def sequences_of(batch: PackedBatch, context: dist.ProcessGroup | None = None) -> Sequences:
    """Which sequence each token of a micro-batch counts for.

    Args:
        batch: a micro-batch, or a context-parallel rank's share of one.
        context: process group of the ranks with the other shares; None for a whole micro-batch.
    """
    ids = torch.where(batch.loss_mask != 0, batch.segment_ids, -1)
    size = len(batch.cu_seqlens) - 1
    if context is None or context.size() == 1:
        return Sequences(ids=ids, size=size)

    def reduce(sums: Tensor) -> Tensor:
        all_reduce(sums, group=context)
        return sums

    return Sequences(ids=ids, size=size, reduce=reduce)
