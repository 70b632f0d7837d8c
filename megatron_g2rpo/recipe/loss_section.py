# SPDX-License-Identifier: Apache-2.0
"""``loss_fn``: the surrogate, and the terms beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.base import Section, conflict
from megatron_g2rpo.recipe.named import NamedSection


class EntropyShaping(Section):
    """``loss_fn.entropy_shaping``: keeps each task's entropy within its bounds (``env.tasks.<task>.entropy``)."""

    enabled: bool
    """Add the term to the loss."""
    weight: NonNegativeFloat
    """Weight of the sum over tasks, loss per nat."""
    sides: Literal["fresh", "sampled"]
    """Which entropies say on what side of its bounds a task is: those of the weights that an update starts from (a
    forward pass more for every update of a step but the first), or of the weights that sampled the step."""


class ReferencePolicyKl(Section):
    """``loss_fn.reference_policy_kl``: the KL divergence from the policy that the run started with."""

    penalty: NonNegativeFloat
    """Its weight; 0: off, and no reference policy is kept."""
    kind: Literal["k1", "k2", "k3"]
    """Schulman's estimators, see ``objective.kl``."""
    where: Literal["loss", "reward"]
    """A term of the loss with gradient, or taken from the reward before advantages are computed."""

    @model_validator(mode="after")
    def _gradient(self) -> ReferencePolicyKl:
        if self.penalty > 0.0 and self.kind == "k1" and self.where == "loss":
            raise conflict("the gradient of k1 in the loss has expectation 0; take k2 or k3", "kind", "where")
        return self


class ImportanceSampling(Section):
    """``loss_fn.importance_sampling``: where the rollout engine and the trainer disagree about the same tokens."""

    truncated_ratio: Annotated[float, Field(ge=1.0)] | None
    """A token's loss is weighted by trainer / engine probability, at most this; null: by 1."""
    sequence_ratio_min: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Sequences whose geometric-mean ratio lies below are masked out of the surrogate's loss; null: none."""
    sequence_ratio_max: Annotated[float, Field(ge=1.0)] | None
    """Sequences whose geometric-mean ratio lies above are masked out of the surrogate's loss; null: none."""


class LossFn(NamedSection):
    """``loss_fn``: the surrogate and the terms beside it; among these keys, what the named surrogate takes."""

    token_level_loss: bool
    """Mean over all response tokens of the batch; false: over sequences of each one's token mean."""
    log_ratio_clamp: PositiveFloat
    """The log-ratio is clamped to plus or minus this before it is exponentiated, nats."""
    reference_policy_kl: ReferencePolicyKl
    """Divergence from the initial policy."""
    importance_sampling: ImportanceSampling
    """Correction of the gap between the rollout engine's and the trainer's log-probabilities."""
    entropy_shaping: EntropyShaping
    """The entropy term."""

    def bound(self) -> Callable[..., Any]:
        """The surrogate with its options; see ``objective.surrogates``."""
        given = {"log_ratio_clamp": self.log_ratio_clamp}
        taken = {key: value for key, value in given.items() if registry.surrogates.takes(self.name, key)}
        return registry.surrogates.bind(self.name, **taken, **self.options)
