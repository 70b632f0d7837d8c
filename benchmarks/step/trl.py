# SPDX-License-Identifier: Apache-2.0
"""TRL's side: ``GRPOTrainer`` in float32, without gradient checkpointing, one update a generation.

Its trainer owns the loop, so this side is a generator's inside out: ``train`` runs, and a callback hands over after
each step. With one update a generation TRL makes no pass for old log-probabilities, and without a KL term no reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]  # of the environment of this benchmark
from transformers import AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.step import workload
from benchmarks.step.meter import Meter, Step, Work, untrained
from benchmarks.step.sizes import Size

# Rollouts of a micro-batch in the form that divides the batch: those of one prompt.
MICRO_PROMPTS = 1


class MeasuredTrainer(GRPOTrainer):  # pyright: ignore[reportGeneralTypeIssues]
    """TRL's trainer with a stopwatch on its phases, and a count of what it generated."""

    meter: Meter
    answer_tokens = 0
    prompt_tokens = 0

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        with self.meter("process"):
            result = super()._tokenize_prompts(prompts)
        self.prompt_tokens = sum(len(ids) for ids in result[0])
        return result

    def _generate_single_turn(self, *args: Any, **keywords: Any) -> Any:
        with self.meter("generation"):
            result = super()._generate_single_turn(*args, **keywords)
        self.answer_tokens = sum(len(ids) for ids in result[0])
        return result

    def _get_per_token_logps_and_entropies(self, *args: Any, **keywords: Any) -> Any:
        with self.meter("update" if torch.is_grad_enabled() else "old log-probabilities"):
            return super()._get_per_token_logps_and_entropies(*args, **keywords)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self.meter("rest"):
            return super()._prepare_inputs(generation_batch)

    def training_step(self, *args: Any, **keywords: Any) -> Any:
        with self.meter("update"):
            return super().training_step(*args, **keywords)


class _Turns(TrainerCallback):
    """Hands a step over when it has ended, and waits until the next one is asked for."""

    def __init__(self, size: Size, hand_over: Callable[[Step], None]) -> None:
        self._size, self._hand_over = size, hand_over
        self.trainer: MeasuredTrainer
        self._updates = self._number = 0
        self._untrained: list[str] = []

    def begin(self) -> None:
        """Begin to measure a step."""
        self.trainer.meter, self._updates = Meter(), 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._number += 1
        if self._number == 1:
            self._untrained = untrained((name, p.grad) for name, p in keywords["model"].named_parameters())
        self._optimizer = self.trainer.meter("update")
        self._optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._optimizer.__exit__(None, None, None)
        self._updates += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        size, trainer = self._size, self.trainer
        work = Work(
            rollouts=size.rollouts,
            prompt_tokens=trainer.prompt_tokens // size.samples,  # it processes a prompt once an answer
            answer_tokens=trainer.answer_tokens,
            updates=self._updates,
            images=size.prompts,
        )
        without, self._untrained = self._untrained, []
        self._hand_over(trainer.meter.stop(work, without))
        self.begin()


def serve(size: Size, directory: Path, *, micro_batches: bool, hand_over: Callable[[Step], None]) -> None:
    """Take steps of TRL until ``hand_over`` raises.

    Args:
        size: the step.
        directory: where the model is, or will be.
        micro_batches: a micro-batch a prompt; else the whole batch is one.
        hand_over: is called with each step after it has ended, and returns when the next is to begin.
    """
    count = size.prompts // MICRO_PROMPTS if micro_batches else 1
    model_directory = workload.build(directory)
    config = GRPOConfig(  # pyright: ignore[reportCallIssue]
        output_dir=str(directory / "trl"),
        max_steps=1000,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.rollouts // count,
        gradient_accumulation_steps=count,
        num_generations=size.samples,
        max_completion_length=size.answer_tokens,
        learning_rate=workload.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=workload.WEIGHT_DECAY,
        max_grad_norm=workload.CLIP_GRAD,
        logging_steps=1000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    turns = _Turns(size, hand_over)
    trainer = MeasuredTrainer(
        model=workload.load(model_directory),
        reward_funcs=_rewards,
        args=config,
        train_dataset=_dataset(size),
        processing_class=AutoProcessor.from_pretrained(model_directory, trust_remote_code=False),
        callbacks=[turns],
    )
    turns.trainer = trainer
    turns.begin()
    trainer.train()


def _dataset(size: Size) -> Dataset:
    numbers = range(size.prompts * workload.DISTINCT_STEPS)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": workload.question(size, number)}] for number in numbers],
            "image": [workload.image(size, number) for number in numbers],
        }
    )


def _rewards(completions: list[Any], **_: Any) -> list[float]:
    return [workload.reward(completion[0]["content"]) for completion in completions]
