# SPDX-License-Identifier: Apache-2.0
"""Our side: ``g2rpo_step`` as ``megatron-g2rpo train`` runs it, by a recipe with TRL's loss and advantages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.step import workload
from benchmarks.step.meter import Meter, Step, Work, untrained
from benchmarks.step.sizes import Size
from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train import g2rpo
from megatron_g2rpo.train.assembly import assemble
from megatron_g2rpo.train.step.timers import Timers

REWARD = Path(__file__).with_name("reward.py")
# Tokens of a packed row that several groups share: all of a step at (i), as TRL's one micro-batch. The calls of a row
# take 20 ms of a core, however few its tokens; a group of more than a quarter of them has a row of its own.
ROW_TOKENS = 5120
# Logits of so many tokens are held at once, more than a row has: those of a vocabulary of 442 are a few megabytes.
LOGIT_TOKENS = 16384
# Advantages; an answer alone has none in its group.
_GROUPS = {"_override_": True, "name": "grpo"}
_ALONE = {"_override_": True, "name": "reinforce_plus_plus", "baseline": "batch"}
# The timers of a step -> the phases of this benchmark.
PHASES = {"data": "process", "generation": "generation", "logprobs": "old log-probabilities", "update": "update"}


def recipe_of(size: Size, directory: Path, *, shared: bool) -> TrainRecipe:
    """Return the recipe: group-normalised advantages and the clipped surrogate, without KL term or entropy shaping.

    Args:
        size: the step.
        directory: where model and prompts are, or will be.
        shared: whether a group's answers share their prompt.
    """
    longest = size.prompt_tokens + size.answer_tokens
    group = size.prompt_tokens + size.samples * size.answer_tokens
    overrides: dict[str, Any] = {
        "imports": [str(REWARD)],
        "grpo.num_prompts_per_step": size.prompts,
        "grpo.num_generations_per_prompt": size.samples,
        "grpo.max_num_steps": 1000,
        "grpo.task_gradient_period": 0,
        "grpo.adv_estimator": _GROUPS if size.samples > 1 else _ALONE,
        "grpo.val_period": 0,
        "grpo.val_at_start": False,
        "grpo.val_at_end": False,
        "loss_fn.entropy_shaping.enabled": False,
        "policy.model_name": workload.build(directory),
        "policy.precision": "float32",
        "policy.train_global_batch_size": size.rollouts,
        "policy.max_total_sequence_length": longest,
        "policy.sequence_packing.train_mb_tokens": ROW_TOKENS if 4 * group <= ROW_TOKENS else group,
        "policy.sequence_packing.shared_prefix": shared,
        "policy.logprob_chunk_size": LOGIT_TOKENS,
        "policy.megatron_cfg.optimizer.lr": workload.LEARNING_RATE,
        "policy.megatron_cfg.optimizer.weight_decay": workload.WEIGHT_DECAY,
        "policy.megatron_cfg.optimizer.clip_grad": workload.CLIP_GRAD,
        "policy.generation.max_new_tokens": size.answer_tokens,
        "policy.generation.batch_size": size.rollouts,
        "data.train.path": workload.write_shards(size, directory),
        "data.validation": None,
        "data.format_instruction": False,
        "data.response_format": "plain",
        "env.reward_weights": {"_override_": True, "odd_characters": 1.0},
        "env.reward_workers": 0,
        "env.tasks": {workload.TASK: {"entropy": None}},
        "logger.log_dir": directory / "log",
        "cluster.device": "cpu",
    }
    written = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return recipes.load(recipes.EXEMPLARS / "vlm_g2rpo.yaml", written, "train")


class ProcessorTimers(Timers):
    """The timers of a step, on the processor's clock."""

    meter: Meter

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure a phase of the step, see ``Timers``."""
        with self.meter(PHASES.get(phase, "rest")), super().__call__(phase):
            yield


class Side:
    """Takes steps of ours.

    Args:
        size: the step.
        directory: where model and prompts are, or will be.
        shared: whether a group's answers share their prompt.
    """

    def __init__(self, size: Size, directory: Path, *, shared: bool) -> None:
        self._size, self._number = size, 0
        self.recipe = recipe_of(size, directory, shared=shared)
        init_process_group(select("cpu"))
        self.components = assemble(self.recipe)

    def step(self) -> Step:
        """Take one step."""
        self._number += 1
        ProcessorTimers.meter = meter = Meter()
        with patch.object(g2rpo, "Timers", ProcessorTimers):
            metrics = g2rpo.g2rpo_step(self.recipe, self.components, self._number)
        answers = metrics["train/response_tokens"] * self._size.rollouts
        work = Work(
            rollouts=self._size.rollouts,
            prompt_tokens=self._size.prompts * self._size.prompt_tokens,
            answer_tokens=round(answers),
            updates=1 - round(metrics["train/skipped_updates"]),
            images=self._size.prompts,
        )
        return meter.stop(work, self._untrained() if self._number == 1 else [])

    def _untrained(self) -> list[str]:
        """Return the parameters without a gradient; the buffer holds them until the next step."""
        gradients = self.components.policy.stream(tensor_of=lambda parameter: parameter.main_grad)  # type: ignore[attr-defined]
        return untrained(gradients)
