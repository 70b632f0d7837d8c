# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo doctor --rollout``: do rollout engine and trainer agree on log-probabilities, token by token?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.data.packing import PackSequence, response_values
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.step.generation import generate
from megatron_g2rpo.train.step.minibatches import check_lengths, owned_prompts, pack_evenly
from megatron_g2rpo.types import Rollout


def compare(recipe: TrainRecipe, prompts: int, samples: int) -> list[str]:
    """Sample a few prompts as the first step of a run would, and set both log-probabilities side by side.

    A collective of all ranks.

    Args:
        recipe: of the run; everything is built as for training.
        prompts: over all ranks.
        samples: of each prompt.

    Returns:
        Lines for the console: the responses of this data-parallel rank token by token, and the largest and mean
        difference over all ranks.
    """
    parts = assemble(recipe)
    temperature, owned = recipe.policy.generation.temperature, owned_prompts(prompts, parts.policy.groups)
    chosen = parts.stream.next_batch(prompts, owned)
    check_lengths(recipe, chosen)
    parts.engine.load_weights(parts.policy.source())
    rollouts = generate(parts, chosen, samples, temperature=temperature, seed=recipe.grpo.seed, group_ids=list(owned))
    parts.engine.release()
    trainer = trainer_logprobs(recipe, parts, rollouts, temperature)
    lines = [line for rollout, values in zip(rollouts, trainer, strict=True) for line in _table(parts, rollout, values)]
    return [*lines, _summary(recipe, parts, rollouts, trainer)]


def trainer_logprobs(
    recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], temperature: float
) -> list[Tensor]:
    """The policy's log-probabilities of this data-parallel rank's responses, float32 ``[R]`` each. A collective."""
    sequences = [
        PackSequence(inputs=r.prompt.inputs, response_ids=r.response_ids, task_id=parts.task_id(r.prompt.task))
        for r in rollouts
    ]
    batches = pack_evenly(parts, sequences, recipe.policy.sequence_packing.train_mb_tokens)
    found: dict[int, Tensor] = {}
    for batch, stats in zip(batches, parts.policy.logprobs(batches, temperature), strict=True):
        found |= response_values(batch, stats.logprobs)
    return [found[index] for index in range(len(rollouts))]


def _table(parts: Components, rollout: Rollout, trainer: Tensor) -> Iterator[str]:
    yield f"{rollout.prompt.key}, sample {rollout.sample_index}: {rollout.prompt.sample.question!r}"
    yield f"{'token':>8}  {'engine':>10}  {'trainer':>10}  {'difference':>10}  text"
    rows = zip(rollout.response_ids.tolist(), rollout.logprobs.tolist(), trainer.tolist(), strict=True)
    for token, engine, own in rows:
        text = parts.processor.tokenizer.decode([token])
        yield f"{token:>8}  {engine:>10.5f}  {own:>10.5f}  {engine - own:>10.1e}  {text!r}"
    yield ""


def _summary(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout], trainer: Sequence[Tensor]) -> str:
    gaps = [(r.logprobs - own).abs().double() for r, own in zip(rollouts, trainer, strict=True)]
    mine = torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.float64)
    sums = torch.tensor([mine.sum(), len(mine)], dtype=torch.float64)
    largest = mine.max() if len(mine) else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(sums, group=parts.policy.groups.data)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parts.policy.groups.data)
    mean, generation = float(sums[0] / sums[1]), recipe.policy.generation
    verdict = "within" if mean <= generation.gap_warning else "ABOVE"
    return (
        f"{int(sums[1])} tokens at temperature {generation.temperature:g}, engine {generation.backend}: the "
        f"log-probabilities differ by {mean:.2e} nats in the mean ({verdict} policy.generation.gap_warning, "
        f"{generation.gap_warning:g}), {float(largest):.2e} at most"
    )
