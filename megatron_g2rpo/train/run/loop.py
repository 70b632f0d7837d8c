# SPDX-License-Identifier: Apache-2.0
"""What the G2RPO loop and supervised training share: start, validation, checkpoints, the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo import weights
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.logs import MetricsLog, StepMetrics
from megatron_g2rpo.train.run.validation import validate


class Run:
    """The state around a loop: which step comes next, when to validate and save.

    Args:
        recipe: of the run.
        parts: as assembled; restored from the newest checkpoint if there is one.
    """

    def __init__(self, recipe: Recipe, parts: Components) -> None:
        self.recipe, self.parts = recipe, parts
        self._loop = recipe.grpo if isinstance(recipe, TrainRecipe) else recipe.sft
        self._checkpoints = Checkpoints(recipe.checkpointing.checkpoint_dir, recipe.checkpointing.keep_latest_k)
        self.first_step = 0
        self._validated = False
        latest = self._checkpoints.latest() if recipe.checkpointing.enabled else None
        if latest is not None:
            state = self._checkpoints.load(latest, parts.policy)
            parts.stream.load_state_dict(state["stream"])
            parts.history.load_state_dict(state["history"])
            self.first_step = state["step"]

    @property
    def last_step(self) -> int:
        """The step that the run ends after."""
        return self._loop.max_num_steps

    @property
    def steps(self) -> range:
        """Steps to do, counted from 1."""
        return range(self.first_step + 1, self.last_step + 1)

    def starting_validation(self, log: MetricsLog) -> dict[str, float]:
        """Metrics of the policy before the first step; empty when not asked for or when the run is resumed."""
        if self.first_step > 0 or not self._loop.val_at_start:
            return {}
        return self._validate(log)

    def validation(self, step: int, log: MetricsLog) -> dict[str, float]:
        """Metrics of the policy after a step, when it is time to validate; else empty."""
        period = self._loop.val_period
        due = self._loop.val_at_end if step == self.last_step else period > 0 and step % period == 0
        return self._validate(log) if due else {}

    def complete(self, step: int, log: MetricsLog, values: Mapping[str, float], *, logged: bool = True) -> None:
        """Validate, log and save a step that was taken, each when it is time.

        Saved after it was logged, so that no step is missing on resumption.

        Args:
            step: of the run.
            log: of the run.
            values: metrics of the step.
            logged: whether its metrics are logged also where it was not validated.

        Raises:
            EngineUnavailable: while validating; the step is logged and saved all the same.
        """
        try:
            validation = self.validation(step, log)
        except EngineUnavailable as error:
            log.log(StepMetrics(step=step, values=values))
            raise self._saved(step, self._state(), error) from error
        if validation or logged:
            log.log(StepMetrics(step=step, values={**values, **validation}))
        options = self.recipe.checkpointing
        if options.enabled and (step == self.last_step or step % options.save_period == 0):
            self._checkpoints.save(step, self.parts.policy, self._state())

    @contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Around a step: one that could not sample leaves a checkpoint of what was before it.

        Raises:
            EngineUnavailable: as the step did; its message says where the checkpoint is.
        """
        before = self._state()
        try:
            yield
        except EngineUnavailable as error:
            raise self._saved(step - 1, before, error) from error

    def _state(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside the policy."""
        return {"stream": self.parts.stream.state_dict(), "history": self.parts.history.state_dict()}

    def _saved(self, step: int, state: dict[str, Any], error: EngineUnavailable) -> EngineUnavailable:
        """The error, after the policy as it is was saved as that of ``step``, unless it was before."""
        options = self.recipe.checkpointing
        if not options.enabled:
            return EngineUnavailable(f"{error}\ncheckpointing.enabled is false: the steps since the start are lost")
        if self._checkpoints.latest() != step:
            self._checkpoints.save(step, self.parts.policy, state)
        return EngineUnavailable(
            f"{error}\n{step} steps are saved in {options.checkpoint_dir}/step_{step}; the same command goes on there"
        )

    def finish(self) -> Path | None:
        """Export the policy as a Hugging Face directory, if the recipe asks for it; where it is."""
        if not self.recipe.checkpointing.export_hf:
            return None
        directory = Path(self.recipe.logger.log_dir) / "hf"
        weights.export_hf(
            self.parts.policy.stream(),
            self.parts.policy.specs(),
            directory,
            source=self.recipe.policy.model_name,
            write=dist.get_rank() == 0,
        )
        dist.barrier()
        return directory

    def _validate(self, log: MetricsLog) -> dict[str, float]:
        start = time.perf_counter()
        self.parts.engine.load_weights(self.parts.policy.source())
        result = validate(self.recipe, self.parts)
        self.parts.engine.release()
        log.examples(result.examples[: self.recipe.logger.num_val_samples_to_print])
        shown = ("val/mean_reward", "val/mean_greedy_reward", "val/mean_greedy_accuracy")
        means = [f"{name[4:]} {result.metrics[name]:.4f}" for name in shown if name in result.metrics]
        log.note("validation  " + "  ".join(means))
        for warning in () if self._validated else result.warnings:
            log.note(warning)
        self._validated = True
        return {**result.metrics, "time/validation": time.perf_counter() - start}
