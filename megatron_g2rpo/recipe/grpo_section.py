# SPDX-License-Identifier: Apache-2.0
"""``grpo`` and ``sft``: the training loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.base import Section, conflict
from megatron_g2rpo.recipe.named import NamedSection


class AdvEstimator(NamedSection):
    """``grpo.adv_estimator``: how rewards become advantages. Further keys are the options of the named estimator."""

    def bound(self) -> Callable[..., Any]:
        """Return the estimator with its options filled in, an ``objective.Estimator``."""
        return registry.estimators.bind(self.name, **self.options)

    @property
    def min_group_size(self) -> int:
        """Number of responses from which a group has advantages under the estimator."""
        least: int | Callable[..., int] = registry.estimators.entry(self.name).facts.get("min_group_size", 1)
        return least if isinstance(least, int) else least(**self.options)


class _Loop(Section):
    max_num_steps: PositiveInt
    """Number of steps of the run."""
    val_period: NonNegativeInt
    """Number of steps between validations; 0: no validation during training."""
    val_at_start: bool
    """Whether to validate before the first step."""
    val_at_end: bool
    """Whether to validate after the last step."""
    max_val_samples: PositiveInt
    """Largest number of validation prompts per task."""
    seed: NonNegativeInt
    """Seed of all random draws: initial weights, order of prompts, sampling."""


class OverlongPenalty(Section):
    """``grpo.overlong_penalty``: the penalty on long responses under ``grpo.overlong: penalise``."""

    buffer: PositiveInt
    """Number of tokens before ``policy.generation.max_new_tokens`` over which the penalty grows to ``weight``."""
    weight: PositiveFloat
    """Penalty at ``policy.generation.max_new_tokens``, which is subtracted from the reward."""


class DynamicSampling(Section):
    """``grpo.dynamic_sampling``: groups without signal are replaced by new prompts."""

    enabled: bool
    """Whether groups without signal are replaced; false: they are trained on as they are (see
    ``grpo.adv_estimator.zero_variance``)."""
    filter_low: Annotated[float, Field(ge=0.0, lt=1.0)] | None
    """Lower bound: a group is dropped if its mean accuracy is not above it; null: no bound."""
    filter_high: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Upper bound: a group is dropped if its mean accuracy is not below it; null: no bound."""
    max_rounds: PositiveInt
    """Largest number of generation rounds per step; if they do not fill the step, dropped groups fill it."""
    oversampling: Annotated[float, Field(ge=1.0)]
    """Number of prompts drawn in a round per missing prompt."""

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
    """Number of prompts per step, over all ranks."""
    num_generations_per_prompt: PositiveInt
    """Number of responses sampled per prompt: the size of a group."""
    overlong: Literal["keep", "mask", "penalise"]
    """What becomes of truncated responses: ``keep`` trains on them, ``mask`` rewards them but leaves them out of the
    loss, ``penalise`` lowers the reward of long and truncated ones."""
    overlong_penalty: OverlongPenalty
    """Size of the penalty under ``penalise``."""
    dynamic_sampling: DynamicSampling
    """How groups without signal are replaced by new prompts."""
    task_gradient_period: NonNegativeInt
    """Number of steps between measurements of each task's share of the gradient, which cost one backward pass per
    task; 0: never."""
    adv_estimator: AdvEstimator
    """How rewards become advantages."""


class Sft(_Loop):
    """``sft``: the supervised training loop. Its batch size is ``policy.train_global_batch_size``."""
