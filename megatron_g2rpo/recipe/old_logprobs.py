# SPDX-License-Identifier: Apache-2.0
"""Which updates of a step need a forward pass of their own before them, because something asks for its results first.

The old log-probabilities of a step's first update are its own forward pass's, without gradient: the weights are those
that sampled. The surrogate's ratio, token weights and sequence masks of importance sampling, and the KL to the
reference policy in the loss, are computed from them where the loss is.
"""

from __future__ import annotations

from megatron_g2rpo.recipe.schema import TrainRecipe


def shapes_entropy(recipe: TrainRecipe) -> bool:
    """Whether the loss has an entropy term: it is enabled, weighs something, and some task has bounds."""
    shaping = recipe.loss_fn.entropy_shaping
    return (
        shaping.enabled and shaping.weight > 0 and any(task.entropy is not None for task in recipe.env.tasks.values())
    )


def needs_entropies_first(recipe: TrainRecipe, *, micro_batches: int) -> bool:
    """Whether the entropies of a minibatch must be known before its update's first backward pass.

    The side of each task's entropy bounds is that of the whole minibatch. With one micro-batch a rank, the loss sums
    the entropies over the ranks itself; with more, the last one's would be missing.

    Args:
        recipe: the run's recipe.
        micro_batches: number of micro-batches of the minibatch on a data-parallel rank, the same on each.
    """
    return shapes_entropy(recipe) and micro_batches > 1


def needs_old_logprobs(recipe: TrainRecipe, *, update: int, micro_batches: int) -> bool:
    """Whether old log-probabilities are computed by a forward pass before the step's first update.

    They are for every update but the first, whose weights will have moved by then; where the reward, and with it the
    advantages, needs them; and where the entropies of the same pass are needed.

    Args:
        recipe: the run's recipe.
        update: number of the update in the step, from 0.
        micro_batches: number of micro-batches of its minibatch on a data-parallel rank, the same on each.
    """
    divergence = recipe.loss_fn.reference_policy_kl
    in_reward = divergence.penalty > 0 and divergence.where == "reward"
    return update > 0 or in_reward or needs_entropies_first(recipe, micro_batches=micro_batches)


def takes_fresh_sides(recipe: TrainRecipe, *, update: int) -> bool:
    """Whether the sides of entropy bounds are those of the weights that a later update of a step starts from.

    Where ``needs_entropies_first`` says so of its minibatch too, they take one more forward pass.

    Args:
        recipe: the run's recipe.
        update: number of the update in the step, from 0.
    """
    shaping = recipe.loss_fn.entropy_shaping
    return update > 0 and shaping.enabled and shaping.sides == "fresh"
