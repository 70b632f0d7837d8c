# SPDX-License-Identifier: Apache-2.0
"""How many passes over a step's rows have no gradient, and are there for log-probabilities or entropies alone."""

from __future__ import annotations

from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.recipe.old_logprobs import needs_entropies_first, needs_old_logprobs, takes_fresh_sides


def updates_of(recipe: Recipe) -> int:
    """Return the number of optimizer steps of a rollout step."""
    return recipe.num_updates_per_step if isinstance(recipe, TrainRecipe) else 1


def without_gradient(recipe: Recipe, micro_batches: int) -> int:
    """Return the number of passes without gradient of a rollout step, each over the rows of one optimizer step.

    Old log-probabilities where an update needs them before it, entropies of the weights that a later update starts
    from, and the reference policy's log-probabilities (``train.g2rpo``).

    Args:
        recipe: the recipe.
        micro_batches: number of micro-batches of an optimizer step on a data-parallel rank.
    """
    if not isinstance(recipe, TrainRecipe):
        return 0
    updates = range(updates_of(recipe))
    old = sum(needs_old_logprobs(recipe, update=update, micro_batches=micro_batches) for update in updates)
    fresh = needs_entropies_first(recipe, micro_batches=micro_batches)
    entropies = sum(fresh and takes_fresh_sides(recipe, update=update) for update in updates)
    reference = recipe.loss_fn.reference_policy_kl.penalty > 0
    return old + entropies + reference * len(updates)
