# SPDX-License-Identifier: Apache-2.0
"""``grpo`` and ``sft``: the loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.base import Section, conflict
from megatron_g2rpo.recipe.named import NamedSection


class AdvEstimator(NamedSection):
    """``grpo.adv_estimator``: from rewards to advantages; beside ``name``, what the named estimator takes."""

    def bound(self) -> Callable[..., Any]:
        """The estimator with its options, an ``objective.Estimator``."""
        return registry.estimators.bind(self.name, **self.options)


class _Loop(Section):
    max_num_steps: PositiveInt
    """Steps of the run."""
    val_period: NonNegativeInt
    """Steps between validations; 0: none in between."""
    val_at_start: bool
    """Validate before the first step."""
    val_at_end: bool
    """Validate after the last step."""
    max_val_samples: PositiveInt
    """Validation prompts per task."""
    seed: NonNegativeInt
    """Seed of everything that is drawn: initial weights, order of prompts, sampling."""


class OverlongPenalty(Section):
    """``grpo.overlong_penalty``: of ``grpo.overlong: penalise``."""

    buffer: PositiveInt
    """Response tokens before ``policy.generation.max_new_tokens`` over which the penalty grows from 0 to all of it."""
    weight: PositiveFloat
    """What is taken from the reward at ``max_new_tokens``."""


class DynamicSampling(Section):
    """``grpo.dynamic_sampling``: groups without signal are replaced by new prompts."""

    enabled: bool
    """Replace them; false: they are trained on as they are (see ``grpo.adv_estimator.zero_variance``)."""
    filter_low: Annotated[float, Field(ge=0.0, lt=1.0)] | None
    """A group whose mean accuracy is not above this is dropped; null: no bound."""
    filter_high: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """A group whose mean accuracy is not below this is dropped; null: no bound."""
    max_rounds: PositiveInt
    """Rounds of generation in a step. What they leave unfilled keeps its dropped groups."""
    oversampling: Annotated[float, Field(ge=1.0)]
    """Prompts drawn in a round per prompt that is missing."""

    @model_validator(mode="after")
    def _order(self) -> DynamicSampling:
        if self.filter_low is not None and self.filter_high is not None and self.filter_low >= self.filter_high:
            raise conflict(
                f"no mean accuracy lies between {self.filter_low} and {self.filter_high}", "filter_low", "filter_high"
            )
        return self


class Grpo(_Loop):
    """``grpo``: the reinforcement-learning loop."""

    num_prompts_per_step: PositiveInt
    """Prompts per step, over all ranks."""
    num_generations_per_prompt: PositiveInt
    """Responses sampled per prompt: the size of a group."""
    overlong: Literal["keep", "mask", "penalise"]
    """Truncated responses: trained on, rewarded but masked out of the loss, or trained on with a lower reward."""
    overlong_penalty: OverlongPenalty
    """How much lower."""
    dynamic_sampling: DynamicSampling
    """Replacement of groups without signal."""
    task_gradient_period: NonNegativeInt
    """Steps between measurements of each task's share of the gradient, a backward pass a task; 0: never."""
    adv_estimator: AdvEstimator
    """From rewards to advantages."""


class Sft(_Loop):
    """``sft``: the supervised loop. The batch size is ``policy.train_global_batch_size``."""
