# SPDX-License-Identifier: Apache-2.0
"""Supervised training of the policy on the responses of the shards: the warm start of reinforcement learning.

Start it with ``megatron-g2rpo sft RECIPE``. ``sft_step`` is one optimizer step; around the steps, ``run/`` validates,
logs, saves and resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.recipe import SftRecipe
from megatron_g2rpo.tasks.prompts import continuation
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.run.logs import Column, StepMetrics
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.step.losses import sft_loss
from megatron_g2rpo.train.step.metrics import memory_metrics, skipped_metrics
from megatron_g2rpo.train.step.minibatches import owned_prompts, pack_evenly
from megatron_g2rpo.train.step.prompts import draw
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.train.step.work import WorkMeter, work_metrics
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
LOG_PERIOD = 10  # steps; the first, the last and every validated or skipped step are logged too


def sft(recipe: SftRecipe, *, quiet: bool = False) -> Path | None:
    """Run supervised training to its end, resuming the run directory's newest checkpoint.

    Args:
        recipe: the run's recipe.
        quiet: whether the console shows warnings alone.

    Returns:
        The exported Hugging Face directory, if the recipe asks for one.

    Raises:
        RunStopped: a signal or a deadline ended it before its last step.
    """
    with assemble(recipe) as components:
        run = Run(recipe, components)
        with run.log(COLUMNS, quiet=quiet) as log, run.naming_checkpoints(log):
            run.begin(log)
            for step in run.steps:
                with run.profiled(step):
                    metrics = sft_step(recipe, components, step, log.note)
                validation = run.validation(step, log, metrics)
                skipped = metrics["train/skipped_updates"] > 0
                if validation or skipped or step % LOG_PERIOD == 0 or step in (1, run.last_step):
                    log.log(StepMetrics(step=step, values={**metrics, **validation}))
                run.save(step)
                run.stop_if_asked(step)
            return run.finish()


def sft_step(
    recipe: SftRecipe, components: Components, step: int, note: Callable[[str], None] = print
) -> dict[str, float]:
    """Take one optimizer step on ``train_global_batch_size`` samples. A collective of all ranks.

    Args:
        recipe: the run's recipe.
        components: what the loop works with.
        step: number of the step, from 1.
        note: shows the user a line.

    Returns:
        The metrics of the step.

    Raises:
        SampleError: a sample cannot be used, see ``PromptStream.next_batch``.
        FloatingPointError: too many updates in a row were to be skipped, see ``UpdateGuard``.
    """
    policy, stream, groups = components.policy, components.stream, components.policy.groups
    timers, skipped, meter = Timers(components.device), stream.skipped.copy(), WorkMeter(policy)
    size = recipe.policy.train_global_batch_size
    with timers("data"):
        prompts = draw(stream, size, owned_prompts(size, groups.data_rank, groups.data_size), groups)
        sequences = [_sequence(components.processor, prompt) for prompt in prompts]
        budget = recipe.policy.sequence_packing.train_mb_tokens
        micro_batches = pack_evenly(components.packer, sequences, budget, groups.data)
    with timers("update"):
        metrics = policy.update(micro_batches, sft_loss, skips=components.guard.skips)
    batch = [
        {"key": prompt.key, "task": prompt.task, "response_ids": sequence.response_ids.tolist()}
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]
    components.guard.settle(step, 0, lambda: batch, group=groups.data, note=note)
    named = {f"train/{name}": value for name, value in metrics.items()}
    named |= skipped_metrics(stream.skipped - skipped)
    named |= work_metrics(meter, policy, timers.seconds, sum(sequence.length for sequence in sequences))
    return {**named, **timers.metrics(), **memory_metrics(components.device)}


def _sequence(processor: ChatProcessor, prompt: Prompt) -> PackSequence:
    assert prompt.sample.response is not None  # the stream checked that there is one, and that it fits
    response = continuation(prompt.sample.response, prompt.response_prefix)
    return PackSequence(
        inputs=prompt.inputs,
        response_ids=processor.encode_response(response, name=f"sample {prompt.key}"),
        task_id=prompt.task_id,
    )
