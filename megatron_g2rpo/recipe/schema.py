# SPDX-License-Identifier: Apache-2.0
"""The two kinds of recipe, and the conditions that must hold between their sections."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import Field, model_validator

from megatron_g2rpo.recipe.base import Section, conflict
from megatron_g2rpo.recipe.data_section import Data
from megatron_g2rpo.recipe.env_section import Env
from megatron_g2rpo.recipe.grpo_section import Grpo, Sft
from megatron_g2rpo.recipe.keys import dotted
from megatron_g2rpo.recipe.loss_section import LossFn
from megatron_g2rpo.recipe.policy_section import Policy
from megatron_g2rpo.recipe.run_sections import Checkpointing, Cluster, Logger, TrainLogger
from megatron_g2rpo.recipe.validation_metrics import validation_metrics


class _Common(Section):
    imports: Annotated[tuple[str, ...], Field(strict=False)]
    """The user's modules and files that every process imports first; files are absolute paths."""
    checkpointing: Checkpointing
    """Which checkpoints are saved, and where."""
    policy: Policy
    """The model, its parallel layout, its optimizer, and how it generates."""
    data: Data
    """The datasets, and how prompts are made of them."""
    env: Env
    """The tasks, and how their responses are rewarded."""
    logger: Logger
    """The run directory, and what is logged."""
    cluster: Cluster
    """How many processes run, and on what hardware."""

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.cluster.num_nodes * self.cluster.gpus_per_node

    @property
    def data_parallel_size(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.policy.megatron_cfg.model_parallel_size

    def _check(self, loop: Grpo | Sft, section: str, max_num_optimizer_steps: int) -> None:
        self._check_layout()
        self._check_tasks()
        self._check_schedule(max_num_optimizer_steps)
        self._check_validation(loop, section)

    def _check_validation(self, loop: Grpo | Sft, section: str) -> None:
        asked = [name for name in ("val_period", "val_at_start", "val_at_end") if getattr(loop, name)]
        if self.data.validation is None and asked:
            keys = [f"{section}.{name}" for name in asked]
            raise conflict(
                f"there is no data to validate on: name it in data.validation.path, or set {', '.join(keys)} to 0 or "
                "false",
                "data.validation",
                *keys,
            )
        self._check_metric(self.checkpointing.metric_name, asked, section)

    def _check_metric(self, metric: str | None, asked: list[str], section: str) -> None:
        if metric is None:
            return
        if not asked:
            raise conflict(
                f"checkpoints are ranked by {metric}, and nothing validates",
                "checkpointing.metric_name",
                *(f"{section}.{name}" for name in ("val_period", "val_at_start", "val_at_end")),
            )
        tasks = self.env.tasks
        weights = [self.env.reward_weights, *(settings.reward_weights for settings in tasks.values())]
        names = list(validation_metrics(tasks, (part for parts in weights for part in parts)))
        if metric not in names:
            near = difflib.get_close_matches(metric, names, n=1, cutoff=0.0)[0]
            raise conflict(
                f"{metric!r} is no metric of this recipe's validation (nearest: {near}; also {', '.join(names[:4])})",
                "checkpointing.metric_name",
            )

    def _check_layout(self) -> None:
        megatron = self.policy.megatron_cfg
        copy = megatron.model_parallel_size
        if self.world_size % copy:
            sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
            raise conflict(
                f"{self.cluster.num_nodes} node(s) x {self.cluster.gpus_per_node} process(es) = {self.world_size}, not "
                f"a multiple of the {copy} that one copy of the model is spread over",
                "cluster.num_nodes",
                "cluster.gpus_per_node",
                *(f"policy.megatron_cfg.{size}" for size in sizes if getattr(megatron, size) > 1),
            )

    def _check_tasks(self) -> None:
        tasks = list(self.env.tasks)
        for task in self.data.task_weights:
            if task not in self.env.tasks:
                near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.0)[0]
                raise conflict(
                    f"'{task}' is not a task of env.tasks (nearest: {near})", dotted("data", "task_weights", task)
                )
        if not any(self.data.task_weights.get(task, 1.0) for task in tasks):
            raise conflict("every task has weight 0: there is nothing to draw", "data.task_weights")
        longest = self.policy.generation.max_new_tokens
        for task, settings in self.env.tasks.items():
            if settings.length is not None and settings.length.peak_start > longest:
                raise conflict(
                    f"no response of {task} can earn the full length reward: it begins at "
                    f"{settings.length.peak_start} tokens, a response has at most {longest}",
                    dotted("env", "tasks", task, "length", "peak_start"),
                    "policy.generation.max_new_tokens",
                )

    def _check_groups(self, samples: int) -> None:
        generation = self.policy.generation
        if generation.backend in ("vllm", "vllm_server") and samples > generation.batch_size:
            raise conflict(
                f"vLLM decodes the {samples} responses of a prompt together, and policy.generation.batch_size is "
                f"{generation.batch_size}",
                "policy.generation.batch_size",
                "grpo.num_generations_per_prompt",
            )

    def _check_schedule(self, max_num_optimizer_steps: int) -> None:
        scheduler = self.policy.megatron_cfg.scheduler
        decay = scheduler.lr_decay_steps or max_num_optimizer_steps
        if scheduler.lr_decay_style != "constant" and scheduler.lr_warmup_steps >= decay:
            raise conflict(
                f"the learning rate would still warm up ({scheduler.lr_warmup_steps} optimizer steps) when its decay "
                f"ends (at {decay})",
                "policy.megatron_cfg.scheduler.lr_warmup_steps",
                "policy.megatron_cfg.scheduler.lr_decay_steps",
            )


class TrainRecipe(_Common):
    """A recipe for ``megatron-g2rpo train``."""

    grpo: Grpo
    """The reinforcement-learning loop."""
    loss_fn: LossFn
    """The surrogate, and the other terms of the loss."""
    logger: TrainLogger  # pyright: ignore[reportIncompatibleVariableOverride]  # nothing assigns it: it is frozen
    """The run directory, and what is logged and recorded."""

    @property
    def num_rollouts_per_step(self) -> int:
        """Number of responses that are sampled per step, over all ranks."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def num_updates_per_step(self) -> int:
        """Number of updates (optimizer steps) per step of the run."""
        return self.num_rollouts_per_step // self.policy.train_global_batch_size

    @model_validator(mode="after")
    def _between_sections(self) -> TrainRecipe:
        batch = self.policy.train_global_batch_size
        if self.num_rollouts_per_step % batch:
            raise conflict(
                f"policy.train_global_batch_size ({batch}) does not divide the {self.num_rollouts_per_step} rollouts "
                f"of a step: {self.grpo.num_prompts_per_step} prompts x {self.grpo.num_generations_per_prompt} "
                "generations",
                "policy.train_global_batch_size",
                "grpo.num_prompts_per_step",
                "grpo.num_generations_per_prompt",
            )
        buffer, longest = self.grpo.overlong_penalty.buffer, self.policy.generation.max_new_tokens
        if self.grpo.overlong == "penalise" and buffer > longest:
            raise conflict(
                f"the penalty would begin {buffer} tokens before the limit of {longest}: every response would have one",
                "grpo.overlong_penalty.buffer",
                "policy.generation.max_new_tokens",
            )
        self._check_parts()
        self._check_groups(self.grpo.num_generations_per_prompt)
        self._check(self.grpo, "grpo", self.grpo.max_num_steps * self.num_updates_per_step)
        return self

    def _check_parts(self) -> None:
        by_task = {
            dotted("env", "tasks", task, "reward_weights"): self.env.tasks[task].reward_weights
            for task in self.env.tasks
        }
        weights = {"env.reward_weights": self.env.reward_weights, **by_task}
        weighed = [f"{key}.overlong" for key, parts in weights.items() if "overlong" in parts]
        if self.grpo.overlong == "penalise" and weighed:
            raise conflict(
                "the part 'overlong' would have two weights; leave it to grpo.overlong_penalty.weight",
                "grpo.overlong",
                *weighed,
            )
        sampling = self.grpo.dynamic_sampling
        filters = [name for name in ("filter_low", "filter_high") if getattr(sampling, name) is not None]
        if sampling.enabled and filters and "accuracy" not in self.env.reward_weights:
            raise conflict(
                "groups are chosen by their mean accuracy, which is not computed; give it a weight, which may be 0",
                "env.reward_weights",
                *(f"grpo.dynamic_sampling.{name}" for name in filters),
            )


class SftRecipe(_Common):
    """A recipe for ``megatron-g2rpo sft``; each optimizer step has ``policy.train_global_batch_size`` sequences."""

    sft: Sft
    """The supervised training loop."""

    @model_validator(mode="after")
    def _between_sections(self) -> SftRecipe:
        self._check(self.sft, "sft", self.sft.max_num_steps)
        return self


Recipe = TrainRecipe | SftRecipe
