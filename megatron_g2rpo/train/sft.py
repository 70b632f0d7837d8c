# SPDX-License-Identifier: Apache-2.0
"""Supervised training of the policy on the responses of the shards: the warm start of reinforcement learning."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.recipe import SftRecipe
from megatron_g2rpo.tasks.prompts import continuation
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.step.losses import sft_loss
from megatron_g2rpo.train.step.metrics import skipped_metrics
from megatron_g2rpo.train.step.minibatches import owned_prompts, pack_evenly
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.types import Prompt

COLUMNS = (
    Column("loss", "train/loss", ".4f"),
    Column("entropy", "train/entropy"),
    Column("grad", "train/grad_norm"),
    Column("lr", "train/lr", ".2e"),
    Column("tokens", "train/num_tokens", ".0f"),
    Column("s/step", "time/step", ".2f"),
    Column("val", "val/mean_greedy_accuracy"),
)
LOG_PERIOD = 10


def sft(recipe: SftRecipe) -> Path | None:
    """Run supervised training to its end, resuming the run directory's newest checkpoint.

    Returns:
        The exported Hugging Face directory, if the recipe asks for one.
    """
    parts = assemble(recipe)
    run = Run(recipe, parts)
    with MetricsLog(recipe, COLUMNS, run.last_step, run.first_step, enabled=dist.get_rank() == 0) as log:
        start = run.starting_validation(log)
        if start:
            log.log(StepMetrics(step=0, values=start))
        for step in run.steps:
            logged = step % LOG_PERIOD == 0 or step in (1, run.last_step)
            run.complete(step, log, sft_step(recipe, parts), logged=logged)
        return run.finish()


def sft_step(recipe: SftRecipe, parts: Components) -> dict[str, float]:
    """One optimizer step on ``train_global_batch_size`` samples; its metrics."""
    timers, groups, skipped = Timers(parts), parts.policy.groups, parts.stream.num_skipped
    size = recipe.policy.train_global_batch_size
    with timers("data"):
        prompts = parts.stream.next_batch(size, owned_prompts(size, groups))
        limit = recipe.policy.max_total_sequence_length
        sequences = [_sequence(parts, prompt, limit) for prompt in prompts]
        batches = pack_evenly(parts, sequences, recipe.policy.sequence_packing.train_mb_tokens)
    with timers("update"):
        metrics = parts.policy.update(batches, sft_loss)
    named = {f"train/{name}": value for name, value in metrics.items()}
    return {**named, **skipped_metrics(parts, skipped), **timers.metrics()}


def _sequence(parts: Components, prompt: Prompt, limit: int) -> PackSequence:
    assert prompt.sample.response is not None  # the stream was asked for samples with one
    sequence = PackSequence(
        inputs=prompt.inputs,
        response_ids=parts.processor.encode_response(
            continuation(prompt.sample.response, prompt.response_prefix), name=f"sample {prompt.key}"
        ),
        task_id=parts.task_id(prompt.task),
    )
    if sequence.length > limit:
        raise SampleError(
            f"sample {prompt.key}: prompt and response have {sequence.length} tokens, more than "
            f"policy.max_total_sequence_length ({limit})"
        )
    return sequence
