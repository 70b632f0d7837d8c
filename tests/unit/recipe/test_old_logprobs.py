# SPDX-License-Identifier: Apache-2.0
"""Claim: a forward pass before an update is made where something asks for its results first, and nowhere else."""

from __future__ import annotations

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe.old_logprobs import needs_entropies_first, needs_old_logprobs, takes_fresh_sides
from tests.common.recipes import G2RPO

SHAPED = "env.tasks={_override_: true, a: {entropy: {low: 0.1, high: 1.0}}, b: {entropy: null}}"
UNSHAPED = "env.tasks={_override_: true, a: {entropy: null}, b: {entropy: null}}"
MASKED = "loss_fn.importance_sampling={truncated_ratio: 2.0, sequence_ratio_min: 0.5, sequence_ratio_max: 2.0}"
KL_IN_LOSS = "loss_fn.reference_policy_kl={penalty: 0.1, kind: k3, where: loss}"
KL_IN_REWARD = "loss_fn.reference_policy_kl={penalty: 0.1, kind: k3, where: reward}"
NO_KL_IN_REWARD = "loss_fn.reference_policy_kl={penalty: 0.0, kind: k3, where: reward}"
OFF = "loss_fn.entropy_shaping.enabled=false"
WEIGHTLESS = "loss_fn.entropy_shaping.weight=0"
DIAGNOSED = "grpo.task_gradient_period=1"


@pytest.mark.parametrize(
    ("keys", "update", "micro_batches", "expected"),
    [
        # Entropy shaping: the sides are those of all micro-batches.
        ((SHAPED,), 0, 1, False),
        ((SHAPED,), 0, 2, True),
        ((SHAPED, "loss_fn.entropy_shaping.sides=sampled"), 0, 2, True),
        ((SHAPED, OFF), 0, 2, False),
        ((SHAPED, WEIGHTLESS), 0, 2, False),
        ((UNSHAPED,), 0, 2, False),
        # Corrections of the engine's gap are functions of the tokens of a sequence, which a row holds whole.
        ((UNSHAPED, MASKED), 0, 8, False),
        # The reward comes before the advantages, and they before the update.
        ((UNSHAPED, KL_IN_LOSS), 0, 8, False),
        ((UNSHAPED, KL_IN_REWARD), 0, 1, True),
        ((UNSHAPED, NO_KL_IN_REWARD), 0, 1, False),
        # Each task's own gradient is that of the same loss, on the same weights.
        ((UNSHAPED, DIAGNOSED), 0, 8, False),
        # Later updates start from other weights.
        ((UNSHAPED,), 1, 1, True),
        ((SHAPED,), 1, 1, True),
    ],
)
def test_old_logprobs_are_computed_first_where_needed(
    keys: tuple[str, ...], update: int, micro_batches: int, expected: bool
) -> None:
    recipe = recipes.load(G2RPO, list(keys), "train")
    assert needs_old_logprobs(recipe, update=update, micro_batches=micro_batches) == expected


@pytest.mark.parametrize(
    ("keys", "update", "micro_batches", "fresh", "first"),
    [
        ((SHAPED,), 0, 2, False, True),
        ((SHAPED,), 1, 1, True, False),
        ((SHAPED,), 1, 2, True, True),
        ((SHAPED, "loss_fn.entropy_shaping.sides=sampled"), 1, 2, False, True),
        ((SHAPED, OFF), 1, 2, False, False),
        # Nothing pulls, so that no pass is worth making; what is logged are the entropies of the update's own pass.
        ((SHAPED, WEIGHTLESS), 1, 2, True, False),
    ],
)
def test_entropies_are_computed_anew_where_needed(
    keys: tuple[str, ...], update: int, micro_batches: int, fresh: bool, first: bool
) -> None:
    recipe = recipes.load(G2RPO, list(keys), "train")
    assert takes_fresh_sides(recipe, update=update) == fresh
    assert needs_entropies_first(recipe, micro_batches=micro_batches) == first
