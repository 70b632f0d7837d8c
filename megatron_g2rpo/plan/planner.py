# SPDX-License-Identifier: Apache-2.0
"""Makes a plan: checks a recipe's layout, and computes its memory, micro-batches and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.plan.memory import StageMemory, stage_memory
from megatron_g2rpo.plan.model import Model
from megatron_g2rpo.plan.passes import updates_of, without_gradient
from megatron_g2rpo.plan.rows import Assumptions, MicroBatches, assume, micro_batches
from megatron_g2rpo.plan.vision_cache import CachedImages, cached_images
from megatron_g2rpo.plan.wire import Traffic, stage_traffic
from megatron_g2rpo.policy.layouts.layout import Layout, check_model, layout_of, token_multiples
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.recipe.layers import load_layers


@dataclass(frozen=True)
class Plan:
    """The memory and traffic that a recipe needs on a cluster.

    Attributes:
        recipe: the recipe that is planned.
        layout: the recipe's parallel sizes.
        model: the recipe's model.
        assumptions: what stands for the data.
        batches: the micro-batches of an optimizer step.
        stages: memory of a rank of each pipeline stage.
        traffic: what a rank of each pipeline stage sends.
    """

    recipe: Recipe
    layout: Layout
    model: Model
    assumptions: Assumptions
    batches: MicroBatches
    stages: tuple[StageMemory, ...]
    traffic: tuple[tuple[Traffic, ...], ...]

    @property
    def worst(self) -> StageMemory:
        """The stage whose rank needs the most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def bubble(self) -> float:
        """Share of a stage's time that 1F1B leaves idle, for stages of equal time: (p - 1) / (m + p - 1)."""
        stages = self.layout.pipeline
        return (stages - 1) / (self.batches.count + stages - 1)

    @property
    def local_tokens(self) -> int:
        """Number of tokens of a full packed row on one context-parallel rank."""
        return self.batches.row.tokens // self.layout.context

    @property
    def multiples(self) -> tuple[int, int]:
        """Numbers of tokens to whose multiples sequences and packed rows are padded."""
        return token_multiples(self.layout)

    @property
    def updates(self) -> int:
        """Number of optimizer steps of a rollout step."""
        return updates_of(self.recipe)

    @property
    def passes(self) -> int:
        """Number of passes without gradient, each over the micro-batches of an optimizer step, in a rollout step."""
        return without_gradient(self.recipe, self.batches.count)

    @property
    def vision_cache(self) -> CachedImages:
        """The image features that a rank keeps in host memory, at most."""
        return cached_images(self.recipe, self.model.config, self.assumptions.image_tokens)

    def fits(self, memory: float) -> bool:
        """Return whether every rank's peak is within ``memory`` bytes."""
        return self.worst.peak <= memory


def load_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Load a recipe of either kind: ``sft`` where it has that section and no ``grpo`` section, otherwise ``train``.

    Raises:
        RecipeError: see ``recipe.load``.
    """
    sections = load_layers(path, overrides).tree
    if "sft" in sections and "grpo" not in sections:
        return recipes.load(path, overrides, "sft")
    return recipes.load(path, overrides, "train")


def make_plan(
    recipe: Recipe,
    model: Model,
    mean_tokens: int | None = None,
    image_tokens: int | None = None,
    *,
    gpu_memory: float = 80e9,
    response_tokens: int | None = None,
) -> Plan:
    """Make the plan of a recipe.

    Args:
        recipe: the validated recipe.
        model: the model of the recipe's ``policy.model_name``.
        mean_tokens, image_tokens, response_tokens: assumptions about the data, see ``rows.assume``.
        gpu_memory: bytes of one GPU.

    Raises:
        LayoutError: the model cannot be split as the recipe asks; names the recipe key.
        ValueError: an assumption is out of range, a sequence does not fit into a row, or vLLM's share of the GPU does
            not hold the model.
    """
    layout = layout_of(recipe.policy.megatron_cfg)
    check_model(model.config, recipe.policy.megatron_cfg)
    assumptions = assume(recipe, model.config, mean_tokens, image_tokens, gpu_memory, response_tokens)
    batches = micro_batches(recipe, layout, assumptions)
    passes = without_gradient(recipe, batches.count) / updates_of(recipe)
    return Plan(
        recipe=recipe,
        layout=layout,
        model=model,
        assumptions=assumptions,
        batches=batches,
        stages=tuple(stage_memory(recipe, model, layout, assumptions, batches)),
        traffic=tuple(
            tuple(stage_traffic(recipe, model, layout, batches, stage, passes=passes))
            for stage in range(layout.pipeline)
        ),
    )
