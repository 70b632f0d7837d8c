# SPDX-License-Identifier: Apache-2.0
"""``loss_fn``: the surrogate, and the other terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.base import Section, conflict
from megatron_g2rpo.recipe.named import NamedSection


class EntropyShaping(Section):
    """``loss_fn.entropy_shaping``: a term that keeps each task's entropy in the bounds ``env.tasks.<task>.entropy``."""

    enabled: bool
    """Whether the entropy term is added to the loss."""
    weight: NonNegativeFloat
    """Weight of the entropy term (a sum over tasks), loss per nat."""
    sides: Literal["fresh", "sampled"]
    """Which entropies decide whether a task is above, below or between its bounds: ``fresh`` takes those of the weights
    that an update starts from (of several micro-batches one more forward pass for every update of a step), ``sampled``
    those of the weights that sampled the step."""


class ReferencePolicyKl(Section):
    """``loss_fn.reference_policy_kl``: the KL divergence from the policy that the run started with."""

    penalty: NonNegativeFloat
    """Weight of the KL term; 0: no KL term, and no reference policy is kept."""
    kind: Literal["k1", "k2", "k3"]
    """Which of Schulman's estimators of the KL divergence is used; see ``objective.kl``."""
    where: Literal["loss", "reward"]
    """Where the KL divergence acts: ``loss`` makes it a term of the loss with gradient, ``reward`` subtracts it from
    the reward before advantages are computed."""

    @model_validator(mode="after")
    def _gradient(self) -> ReferencePolicyKl:
        if self.penalty > 0.0 and self.kind == "k1" and self.where == "loss":
            raise conflict("the gradient of k1 in the loss has expectation 0; take k2 or k3", "kind", "where")
        return self


class ImportanceSampling(Section):
    """``loss_fn.importance_sampling``: correction of the training-inference mismatch.

    That is the gap between the rollout engine's and the trainer's log-probabilities of the same tokens.
    """

    truncated_ratio: Annotated[float, Field(ge=1.0)] | None
    """Largest importance weight: a token's loss is multiplied by trainer / engine probability, at most by this; null:
    the loss is not weighted."""
    sequence_ratio_min: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Lower bound: sequences whose geometric-mean ratio is below it are masked out of the surrogate's loss; null: no
    bound."""
    sequence_ratio_max: Annotated[float, Field(ge=1.0)] | None
    """Upper bound: sequences whose geometric-mean ratio is above it are masked out of the surrogate's loss; null: no
    bound."""


class LossFn(NamedSection):
    """``loss_fn``: the surrogate and the other terms of the loss. Further keys are the named surrogate's options."""

    token_level_loss: bool
    """Whether the loss is the mean over all response tokens of the batch; false: the mean over sequences of each
    sequence's token mean."""
    log_ratio_clamp: PositiveFloat
    """Bound, nats: log-ratios are clamped to plus or minus this before they are exponentiated."""
    reference_policy_kl: ReferencePolicyKl
    """KL divergence from the policy that the run started with."""
    importance_sampling: ImportanceSampling
    """Correction of the gap between the rollout engine's and the trainer's log-probabilities."""
    entropy_shaping: EntropyShaping
    """Term that keeps each task's entropy between its bounds."""

    def bound(self) -> Callable[..., Any]:
        """Return the surrogate with its options filled in; see ``objective.surrogates``."""
        given = {"log_ratio_clamp": self.log_ratio_clamp}
        taken = {key: value for key, value in given.items() if registry.surrogates.takes(self.name, key)}
        return registry.surrogates.bind(self.name, **taken, **self.options)
