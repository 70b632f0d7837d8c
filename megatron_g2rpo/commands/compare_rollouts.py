# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo doctor --rollout``: do rollout engine and trainer agree on log-probabilities, token by token?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.data.packing import Packer, PackSequence, response_values
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.recipe.generation_section import Generation
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.step.generation import generate
from megatron_g2rpo.train.step.minibatches import owned_prompts, pack_evenly
from megatron_g2rpo.train.step.prompts import draw
from megatron_g2rpo.types import Rollout


def compare(recipe: TrainRecipe, prompts: int, samples: int) -> list[str]:
    """Sample a few prompts as the first step of a run would, and set both log-probabilities side by side.

    A collective of all ranks.

    Args:
        recipe: the run's recipe; everything is built as for training.
        prompts: number of prompts, over all ranks.
        samples: number of responses to each prompt.

    Returns:
        Lines for the console: the responses of this data-parallel rank token by token, and the largest and mean
        difference over all ranks.
    """
    with assemble(recipe) as components:
        return _compared(recipe, components, prompts, samples)


def _compared(recipe: TrainRecipe, components: Components, prompts: int, samples: int) -> list[str]:
    engine, policy, groups = components.engine, components.policy, components.policy.groups
    generation, budget = recipe.policy.generation, recipe.policy.sequence_packing.train_mb_tokens
    owned = owned_prompts(prompts, groups.data_rank, groups.data_size)
    chosen = draw(components.stream, prompts, owned, groups)
    engine.load_weights(policy.source())
    rollouts = generate(
        engine,
        policy,
        chosen,
        samples,
        sampling=Sampling.of_training(generation),
        seed=recipe.grpo.seed,
        group_ids=list(owned),
    )
    engine.release()
    trainer = trainer_logprobs(policy, components.packer, rollouts, budget, generation.temperature)
    pairs = zip(rollouts, trainer, strict=True)
    lines = [line for rollout, values in pairs for line in _table(components.processor, rollout, values)]
    return [*lines, _summary(generation, rollouts, trainer, groups.data)]


def trainer_logprobs(
    policy: MegatronPolicy, packer: Packer, rollouts: Sequence[Rollout], budget: int, temperature: float
) -> list[Tensor]:
    """The policy's log-probabilities of the tokens of each response. A collective of all ranks.

    Args:
        policy: the trainer.
        packer: packs sequences into micro-batches.
        rollouts: this data-parallel rank's rollouts.
        budget: tokens that a micro-batch holds at most.
        temperature: temperature of the policy's distribution.

    Returns:
        float32 ``[R]`` for each rollout.
    """
    sequences = [
        PackSequence(inputs=r.prompt.inputs, response_ids=r.response_ids, task_id=r.prompt.task_id, kept_ids=r.kept_ids)
        for r in rollouts
    ]
    batches = pack_evenly(packer, sequences, budget, policy.groups.data)
    found: dict[int, Tensor] = {}
    for batch, stats in zip(batches, policy.logprobs(batches, temperature), strict=True):
        found |= response_values(batch, stats.logprobs)
    return [found[index] for index in range(len(rollouts))]


def _table(processor: ChatProcessor, rollout: Rollout, trainer: Tensor) -> Iterator[str]:
    yield f"{rollout.prompt.key}, sample {rollout.sample_index}: {rollout.prompt.sample.question!r}"
    yield f"{'token':>8}  {'engine':>10}  {'trainer':>10}  {'difference':>10}  text"
    lines = zip(rollout.response_ids.tolist(), rollout.logprobs.tolist(), trainer.tolist(), strict=True)
    for token, engine, own in lines:
        text = processor.tokenizer.decode([token])
        yield f"{token:>8}  {engine:>10.5f}  {own:>10.5f}  {engine - own:>10.1e}  {text!r}"
    yield ""


def _summary(
    generation: Generation,
    rollouts: Sequence[Rollout],
    trainer: Sequence[Tensor],
    process_group: dist.ProcessGroup,
) -> str:
    gaps = [(r.logprobs - own).abs().double() for r, own in zip(rollouts, trainer, strict=True)]
    mine = torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.float64)
    sums = torch.tensor([mine.sum(), len(mine)], dtype=torch.float64)
    largest = mine.max() if len(mine) else torch.zeros((), dtype=torch.float64)
    all_reduce(sums, group=process_group)
    all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    mean = float(sums[0] / sums[1])
    verdict = "within" if mean <= generation.gap_warning else "ABOVE"
    return (
        f"{int(sums[1])} tokens at temperature {generation.temperature:g}, engine {generation.backend}: the "
        f"log-probabilities differ by {mean:.2e} nats in the mean ({verdict} policy.generation.gap_warning, "
        f"{generation.gap_warning:g}), {float(largest):.2e} at most"
    )
