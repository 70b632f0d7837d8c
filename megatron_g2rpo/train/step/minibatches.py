# SPDX-License-Identifier: Apache-2.0
"""Which prompts each data-parallel rank owns, and the step's rollouts as packed minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.data.packing import Packer, PackSequence, with_advantages
from megatron_g2rpo.recipe import Policy
from megatron_g2rpo.recipe.grpo_section import Grpo
from megatron_g2rpo.types import PackedBatch, Rollout


def owned_prompts(size: int, data_rank: int, data_size: int) -> range:
    """Prompts of a global batch that a data-parallel rank owns: every data_size-th, so that tasks spread evenly.

    Args:
        size: prompts in the global batch.
        data_rank: the rank's place among the data-parallel ranks.
        data_size: number of data-parallel ranks.
    """
    return range(data_rank, size, data_size)


@dataclass(frozen=True)
class Minibatch:
    """This rank's part of the rollouts of one update.

    Attributes:
        rollouts: int64 ``[M]``, which of this rank's rollouts of the step it holds, in the order in which they were
            packed.
        micro_batches: the rollouts, packed; as many micro-batches as on every other data-parallel rank.
        entropies: float32 ``[S]`` for each micro-batch, entropies of the old policy; empty before it has computed them.
    """

    rollouts: Tensor
    micro_batches: list[PackedBatch]
    entropies: list[Tensor] = field(default_factory=list)

    def with_advantages(self, advantages: Tensor) -> Minibatch:
        """The minibatch with the advantages of its rollouts on their tokens.

        Args:
            advantages: float64 ``[N]``, one for each of this rank's rollouts of the step.
        """
        mine = advantages[self.rollouts]
        return replace(self, micro_batches=[with_advantages(batch, mine) for batch in self.micro_batches])


def pack_minibatches(
    grpo: Grpo,
    policy: Policy,
    packer: Packer,
    rollouts: Sequence[Rollout],
    failed: Tensor,
    *,
    token_level_loss: bool,
    process_group: dist.ProcessGroup,
) -> list[Minibatch]:
    """Pack the step's rollouts into its minibatches, without advantages. A collective of the data-parallel ranks.

    A minibatch is ``train_global_batch_size`` consecutive rollouts of the global batch, in the order of (prompt,
    sample): which rollouts it holds does not depend on the number of ranks.

    Args:
        grpo: the recipe's section: prompts and responses of a step, and what becomes of truncated responses.
        policy: the recipe's section: rollouts of a minibatch, and tokens of a micro-batch.
        packer: packs sequences into micro-batches.
        rollouts: this data-parallel rank's rollouts of the step.
        failed: bool ``[N]``, which of them have no reward, and are left out of the loss.
        token_level_loss: whether the loss is a mean over tokens, or over sequences of each one's token mean.
        process_group: the data-parallel ranks, over which the global batch is spread.
    """
    samples, size = grpo.num_generations_per_prompt, policy.train_global_batch_size
    members: list[list[int]] = [[] for _ in range(grpo.num_prompts_per_step * samples // size)]
    for index, rollout in enumerate(rollouts):
        members[(rollout.group_id * samples + rollout.sample_index) // size].append(index)
    masked = [grpo.overlong == "mask" and rollout.truncated for rollout in rollouts]
    in_loss = [not (mask or without) for mask, without in zip(masked, failed.tolist(), strict=True)]
    complete: list[Minibatch] = []
    for chosen in members:
        sequences = _sequences(
            [rollouts[index] for index in chosen],
            [in_loss[index] for index in chosen],
            token_level_loss=token_level_loss,
            process_group=process_group,
        )
        complete.append(
            Minibatch(
                rollouts=torch.tensor(chosen, dtype=torch.int64),
                micro_batches=pack_evenly(packer, sequences, policy.sequence_packing.train_mb_tokens, process_group),
            )
        )
    return complete


def _sequences(
    rollouts: Sequence[Rollout], in_loss: Sequence[bool], *, token_level_loss: bool, process_group: dist.ProcessGroup
) -> list[PackSequence]:
    weights = [1.0] * len(rollouts)
    if not token_level_loss:
        weights = _sequence_weights(rollouts, in_loss, process_group)
    return [
        PackSequence(
            inputs=rollout.prompt.inputs,
            response_ids=rollout.response_ids,
            task_id=rollout.prompt.task_id,
            behaviour_logprobs=rollout.logprobs,
            kept_ids=rollout.kept_ids,
            token_weight=weight,
            in_loss=kept,
        )
        for rollout, weight, kept in zip(rollouts, weights, in_loss, strict=True)
    ]


def _sequence_weights(
    rollouts: Sequence[Rollout], in_loss: Sequence[bool], process_group: dist.ProcessGroup
) -> list[float]:
    """Token weights that turn "sum over tokens / global token count" into a mean over sequences of token means."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    totals = torch.tensor(
        [sum(length for length, kept in zip(lengths, in_loss, strict=True) if kept), sum(in_loss)], dtype=torch.float64
    )
    all_reduce(totals, group=process_group)
    tokens, sequences = totals.tolist()
    return [tokens / (max(sequences, 1.0) * length) for length in lengths]


def pack_evenly(
    packer: Packer, sequences: list[PackSequence], budget: int, process_group: dist.ProcessGroup
) -> list[PackedBatch]:
    """Micro-batches of this rank, as many as the data-parallel rank with the most needs. A collective.

    Args:
        packer: packs sequences into micro-batches.
        sequences: this data-parallel rank's sequences.
        budget: tokens that a micro-batch holds at most.
        process_group: the data-parallel ranks.
    """
    bins = packer.bins(sequences, budget)
    needed = torch.tensor([len(bins)])
    all_reduce(needed, op=dist.ReduceOp.MAX, group=process_group)
    return packer.rows(sequences, bins, num_bins=max(int(needed), 1))
