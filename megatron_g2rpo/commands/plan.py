# SPDX-License-Identifier: Apache-2.0
"""The verb ``plan``: what ``megatron_g2rpo.cli`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_g2rpo.plan import show
from megatron_g2rpo.plan.model import Model, config_dir, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.verdict import judge

# What a rehearsal runs on, in the place of what a GPU would take.
LOCAL_MODULES = tuple(f"policy.megatron_cfg.{key}=local" for key in ("transformer_impl", "core_attention"))


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
        Whether it fits.

    Raises:
        RecipeError, LayoutError, ModelConfigError, RehearsalError, ValueError: the recipe cannot be run; names the key
            to change, or the stage that failed.
    """
    recipe = load_recipe(path, overrides)
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
        local = again(LOCAL_MODULES)  # a rehearsal runs on the CPU
        rehearsal, tables = rehearsed.tree(recipe, local, stages), [rehearsed.tables(recipe, local, stages)]
    if as_json:
        print(show.as_json(plan, verdict, memory, rehearsal))
    else:
        Console(highlight=False, soft_wrap=False).print(show.tables(plan, verdict, memory), *tables)
    return verdict.fits
