# SPDX-License-Identifier: Apache-2.0
"""Which rows each data-parallel rank owns, and the step's rollouts as packed minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.packing import PackSequence, with_advantages
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.types import PackedBatch, Prompt, Rollout


def owned_prompts(size: int, groups: ParallelGroups) -> range:
    """Rows of a global batch that this data-parallel rank owns: every data_size-th, so that tasks spread evenly."""
    return range(groups.data_rank, size, groups.data_size)


def check_lengths(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Refuse a prompt that leaves no room for a response.

    Raises:
        SampleError: naming the sample.
    """
    room = recipe.policy.max_total_sequence_length - recipe.policy.generation.max_new_tokens
    for prompt in prompts:
        if len(prompt.inputs.token_ids) > room:
            raise SampleError(
                f"sample {prompt.key}: its prompt has {len(prompt.inputs.token_ids)} tokens, more than the {room} that "
                "policy.max_total_sequence_length leaves beside policy.generation.max_new_tokens; lower "
                "data.max_pixels, or raise policy.max_total_sequence_length"
            )


@dataclass(frozen=True)
class Minibatch:
    """This rank's part of the sequences of one optimizer step.

    Attributes:
        rollouts: which of this rank's rollouts of the step it holds, in the order in which they were packed.
        micro_batches: the rollouts, packed; as many as on every other data-parallel rank.
    """

    rollouts: Tensor
    micro_batches: list[PackedBatch]

    def with_advantages(self, advantages: Tensor) -> Minibatch:
        """With the advantages ``[N]`` of all of this rank's rollouts of the step."""
        return replace(
            self, micro_batches=[with_advantages(row, advantages[self.rollouts]) for row in self.micro_batches]
        )


def minibatches(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout]) -> list[Minibatch]:
    """The step's minibatches, without advantages. A collective over the data-parallel group.

    A minibatch is ``train_global_batch_size`` consecutive rollouts of the global batch, in the order of (prompt,
    sample): which rollouts it holds does not depend on the number of ranks.
    """
    samples = recipe.grpo.num_generations_per_prompt
    members: list[list[int]] = [[] for _ in range(recipe.num_updates_per_step)]
    for index, rollout in enumerate(rollouts):
        row = rollout.group_id * samples + rollout.sample_index
        members[row // recipe.policy.train_global_batch_size].append(index)
    budget = recipe.policy.sequence_packing.train_mb_tokens
    return [
        Minibatch(
            rollouts=torch.tensor(chosen, dtype=torch.int64),
            micro_batches=pack_evenly(parts, _sequences(recipe, parts, [rollouts[i] for i in chosen]), budget),
        )
        for chosen in members
    ]


def _sequences(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout]) -> list[PackSequence]:
    in_loss = [not (rollout.truncated and recipe.grpo.overlong == "mask") for rollout in rollouts]
    weights = [1.0] * len(rollouts)
    if not recipe.loss_fn.token_level_loss:
        weights = _sequence_weights(parts, rollouts, in_loss)
    return [
        PackSequence(
            inputs=rollout.prompt.inputs,
            response_ids=rollout.response_ids,
            task_id=parts.task_id(rollout.prompt.task),
            behaviour_logprobs=rollout.logprobs,
            token_weight=weight,
            in_loss=kept,
        )
        for rollout, weight, kept in zip(rollouts, weights, in_loss, strict=True)
    ]


def _sequence_weights(parts: Components, rollouts: Sequence[Rollout], in_loss: Sequence[bool]) -> list[float]:
    """Token weights that turn "sum over tokens / global token count" into a mean over sequences of token means."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    totals = torch.tensor(
        [sum(length for length, kept in zip(lengths, in_loss, strict=True) if kept), sum(in_loss)], dtype=torch.float64
    )
    dist.all_reduce(totals, group=parts.policy.groups.data)
    tokens, sequences = totals.tolist()
    return [tokens / (max(sequences, 1.0) * length) for length in lengths]


def pack_evenly(parts: Components, sequences: list[PackSequence], budget: int) -> list[PackedBatch]:
    """Micro-batches of this rank, as many as the data-parallel rank with the most needs. A collective."""
    needed = torch.tensor([parts.packer.num_rows(sequences, budget)])
    dist.all_reduce(needed, op=dist.ReduceOp.MAX, group=parts.policy.groups.data)
    return parts.packer.pack(sequences, budget, num_bins=max(int(needed), 1))
