# SPDX-License-Identifier: Apache-2.0
"""Whether generation's forward pass of the vision tower serves the update as well (``policy.vision_graph_mb``)."""

from __future__ import annotations

from megatron_g2rpo.recipe.schema import Recipe, TrainRecipe


def why_no_graphs(recipe: Recipe) -> str | None:
    """Return why the update runs the vision tower itself; None where it reads what generation has encoded.

    Where the layout shares a row among ranks, an image is encoded by another rank in the update than in generation.
    Overlapped gradient reduction begins with a row's backward pass, before the tower's. The reference policy takes the
    place of the policy's weights between generation and update.
    """
    policy, megatron = recipe.policy, recipe.policy.megatron_cfg
    if not isinstance(recipe, TrainRecipe):
        return "nothing is generated for training"
    reasons = {
        "policy.vision_graph_mb is 0": not policy.vision_graph_mb,
        "policy.vision_cache_mb is 0": not policy.vision_cache_mb,
        "the vision tower is frozen": megatron.freeze_vision,
        f"the engine {policy.generation.backend} runs a vision tower of its own": (
            policy.generation.backend != "transformers"
        ),
        "ranks share rows": megatron.model_parallel_size > 1,
        "gradient reduction is overlapped": megatron.distributed_data_parallel_config.overlap_grad_reduce,
        "a reference policy takes the place of the weights": recipe.loss_fn.reference_policy_kl.penalty > 0,
        "FP8 is on": megatron.fp8_cfg.enabled,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
