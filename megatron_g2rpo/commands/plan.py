# SPDX-License-Identifier: Apache-2.0
"""The verb ``plan``: what ``megatron_g2rpo.cli`` calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_g2rpo import models
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.plan import show
from megatron_g2rpo.plan.model import Model, config_dir, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.rows import Assumptions, micro_batches
from megatron_g2rpo.plan.verdict import judge
from megatron_g2rpo.policy.layouts.layout import check_model_dir, layout_of
from megatron_g2rpo.recipe import Recipe


def run(
    path: Path,
    overrides: Sequence[str],
    *,
    gpu_memory_gb: float,
    mean_tokens: int | None,
    image_tokens: int | None,
    as_json: bool,
    rehearse: bool,
) -> bool:
    """Plan a recipe and print the plan.

    Args:
        path: the recipe.
        overrides: ``key=value`` each.
        gpu_memory_gb: memory of one GPU, 10^9 bytes.
        mean_tokens: mean tokens of a sequence, prompt and response; None for the longest that the recipe allows.
        image_tokens: image tokens of a prompt; None for the most that the recipe allows.
        as_json: print JSON instead of tables.
        rehearse: also build and run one rank of some stages, on tensors without values, and compare.

    Returns:
        Whether it fits. A text-only model, which is only ever rehearsed, has no verdict and always does.

    Raises:
        RecipeError, LayoutError, ModelConfigError, RehearsalError, ValueError: the recipe cannot be run; names the key
            to change, or the stage that failed.
    """
    recipe = load_recipe(path, overrides)
    if rehearse and _is_text_only(recipe):
        _rehearse_text(recipe, mean_tokens, as_json=as_json)
        return True
    model = Model(read_config(recipe.policy.model_name))
    memory = gpu_memory_gb * show.GB

    def again(more: Sequence[str]) -> Plan:
        return make_plan(load_recipe(path, [*overrides, *more]), model, mean_tokens, image_tokens, gpu_memory=memory)

    plan = make_plan(recipe, model, mean_tokens, image_tokens, gpu_memory=memory)
    verdict = judge(plan, memory, again)
    rehearsal, tables = None, []
    if rehearse:
        from megatron_g2rpo.commands.rehearsal import show as rehearsed
        from megatron_g2rpo.commands.rehearsal.stage import rehearse as rehearse_recipe

        stages = rehearse_recipe(recipe, str(config_dir(recipe.policy.model_name)), plan.batches)
        rehearsal, tables = rehearsed.tree(recipe, plan, stages), [rehearsed.tables(recipe, plan, stages)]
    if as_json:
        print(show.as_json(plan, verdict, memory, rehearsal))
    else:
        Console(highlight=False, soft_wrap=False).print(show.tables(plan, verdict, memory), *tables)
    return verdict.fits


def _is_text_only(recipe: Recipe) -> bool:
    config = load_config(config_dir(recipe.policy.model_name))
    return models.family(config.model_type).vision is None


def _rehearse_text(recipe: Recipe, mean_tokens: int | None, *, as_json: bool) -> None:
    """Rehearse a model that a plan has no formulas for, and print what was counted."""
    from megatron_g2rpo.commands.rehearsal import show as rehearsed
    from megatron_g2rpo.commands.rehearsal.stage import rehearse

    directory, layout = config_dir(recipe.policy.model_name), layout_of(recipe.policy.megatron_cfg)
    check_model_dir(directory, recipe.policy.megatron_cfg)
    tokens = recipe.policy.max_total_sequence_length if mean_tokens is None else mean_tokens
    batches = micro_batches(recipe, layout, Assumptions(tokens, image_tokens=0, gpu_memory=0.0))
    stages = rehearse(recipe, str(directory), batches)
    if as_json:
        print(json.dumps({"rehearsal": rehearsed.tree(recipe, None, stages)}, indent=2))
    else:
        Console(highlight=False, soft_wrap=False).print(rehearsed.tables(recipe, None, stages))
