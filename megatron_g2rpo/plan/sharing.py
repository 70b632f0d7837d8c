# SPDX-License-Identifier: Apache-2.0
"""What a recipe saves where the responses of a group share their prompt, or would save: the same plan both ways.

The two differ in ``policy.sequence_packing.shared_prefix`` alone. Generation does not: it pays for a prompt once
whatever the trainer does.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.models.cards import Card
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.rows import shares_prompts
from megatron_g2rpo.plan.speed import estimate, forward_flops
from megatron_g2rpo.recipe import TrainRecipe

KEY = "policy.sequence_packing.shared_prefix"


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a step costs one way.

    Attributes:
        tokens: tokens that pass through the layers in a step's forward passes for the update, over all data-parallel
            ranks, without padding.
        micro_batches: micro-batches of a data-parallel rank in a step.
        attention_flops: operations of the core attention in these passes, over all ranks.
        flops: all operations in these passes, over all ranks.
        logprobs: seconds of the passes without gradient.
        update: seconds of forward and backward passes.
        step: seconds of the whole step.
        activations: bytes that the fullest rank keeps of all micro-batches in flight.
        peak: bytes of the fullest rank at its peak.
    """

    tokens: int
    micro_batches: int
    attention_flops: float
    flops: float
    logprobs: float
    update: float
    step: float
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """A recipe with its prompts shared, and without.

    Attributes:
        on: whether the recipe shares them.
        prompt_tokens, response_tokens: assumed number of tokens of a prompt and of a response.
        samples: responses of a prompt.
        together: most responses that lie in one row with one copy of their prompt.
        shared, unshared: what a step costs each way.
    """

    on: bool
    prompt_tokens: int
    response_tokens: int
    samples: int
    together: int
    shared: Way
    unshared: Way

    @property
    def saves(self) -> bool:
        """Whether sharing makes a pass smaller."""
        return self.shared.tokens < self.unshared.tokens

    @property
    def sentence(self) -> str:
        """What sharing saves, or would save, in one sentence."""
        assumed = f"prompts of {self.prompt_tokens:,} and {self.samples} responses of {self.response_tokens:,} tokens"
        if self.together < 2:
            return (
                f"Sharing prompts saves nothing with {assumed}: a row holds no two responses beside their prompt; "
                "raise policy.sequence_packing.train_mb_tokens, or say what the data is like (--mean-tokens)."
            )
        shared, unshared = self.shared, self.unshared
        seconds = [way.logprobs + way.update for way in (unshared, shared)]
        return (
            f"Sharing prompts {'saves' if self.on else 'would save'} {1 - shared.tokens / unshared.tokens:.0%} of the "
            f"tokens of a pass with {assumed}, and {1 - seconds[1] / seconds[0]:.0%} of the seconds of its passes "
            f"({seconds[0]:,.2f} to {seconds[1]:,.2f})."
        )


def both_ways(plan: Plan, other: Plan, card: Card) -> Sharing:
    """Compare a plan with that of the same recipe with ``KEY`` the other way.

    Args:
        plan: the plan of a G2RPO recipe as it is.
        other: the plan with ``other_way`` as a further override.
        card: the GPU.

    Raises:
        TypeError: the recipe is of another kind: its sequences share nothing.
    """
    recipe, assumed = plan.recipe, plan.assumptions
    if not isinstance(recipe, TrainRecipe):
        raise TypeError("a supervised recipe has one response a prompt, and shares nothing")
    on = shares_prompts(recipe)
    shared, unshared = (plan, other) if on else (other, plan)
    return Sharing(
        on=on,
        prompt_tokens=assumed.prompt_tokens,
        response_tokens=assumed.response_tokens,
        samples=recipe.grpo.num_generations_per_prompt,
        together=shared.batches.together,
        shared=_way(shared, card),
        unshared=_way(unshared, card),
    )


def other_way(plan: Plan) -> str:
    """Return the override that turns a plan's sharing around."""
    return f"{KEY}={'false' if shares_prompts(plan.recipe) else 'true'}"


def _way(plan: Plan, card: Card) -> Way:
    speed, pass_ = estimate(plan, card), forward_flops(plan)
    passes = plan.updates * plan.recipe.data_parallel_size
    return Way(
        tokens=passes * plan.batches.computed,
        micro_batches=plan.updates * plan.batches.count,
        attention_flops=passes * pass_.attention,
        flops=passes * pass_.total,
        logprobs=speed.logprobs,
        update=speed.update,
        step=speed.step,
        activations=max(stage.activations for stage in plan.stages),
        peak=plan.worst.peak,
    )
