# SPDX-License-Identifier: Apache-2.0
"""The verb ``plan``: what ``megatron_g2rpo.cli`` calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_g2rpo.models.cards import CARDS
from megatron_g2rpo.plan import show, show_sharing, show_speed
from megatron_g2rpo.plan.model import Model, config_dir, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.rows import assume
from megatron_g2rpo.plan.sharing import both_ways, other_way
from megatron_g2rpo.plan.speed import estimate
from megatron_g2rpo.plan.sweep import sweep
from megatron_g2rpo.plan.verdict import judge
from megatron_g2rpo.recipe import TrainRecipe

# What a rehearsal runs on, in the place of what a GPU would take.
LOCAL_MODULES = tuple(f"policy.megatron_cfg.{key}=local" for key in ("transformer_impl", "core_attention"))


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a recipe is planned for.

    Attributes:
        card: name of the GPU, a key of ``models.cards.CARDS``.
        gpu_memory_gb: memory of one, 10^9 bytes; None for the card's.
        mean_tokens: mean tokens of a sequence, prompt and response; None for the longest that the recipe allows.
        image_tokens: image tokens of a prompt; None for the most that the recipe allows.
        response_tokens: mean tokens of a response; None for all that is no image.
    """

    card: str
    gpu_memory_gb: float | None
    mean_tokens: int | None
    image_tokens: int | None
    response_tokens: int | None

    @property
    def memory(self) -> float:
        """Bytes of one GPU.

        Raises:
            ValueError: there is no card of that name.
        """
        if self.card not in CARDS:
            raise ValueError(f"--card {self.card}: known are {', '.join(CARDS)}")
        return CARDS[self.card].memory if self.gpu_memory_gb is None else self.gpu_memory_gb * show.GB


class _Planner:
    """Plans a recipe again and again, with further overrides.

    Args:
        path, overrides: the recipe.
        machines: what it is planned for.
    """

    def __init__(self, path: Path, overrides: Sequence[str], machines: Machines) -> None:
        self._path, self._overrides, self._machines = path, overrides, machines
        self.recipe = load_recipe(path, overrides)
        self._model = Model(read_config(self.recipe.policy.model_name))

    def check(self) -> None:
        """Check what is said of machines and data, which is so for every layout.

        Raises:
            ValueError: a number is out of its range; names the option.
        """
        machines = self._machines
        numbers = machines.mean_tokens, machines.image_tokens, machines.memory, machines.response_tokens
        assume(self.recipe, self._model.config, *numbers)

    def __call__(self, more: Sequence[str] = ()) -> Plan:
        machines = self._machines
        return make_plan(
            load_recipe(self._path, [*self._overrides, *more]) if more else self.recipe,
            self._model,
            machines.mean_tokens,
            machines.image_tokens,
            gpu_memory=machines.memory,
            response_tokens=machines.response_tokens,
        )


def run(path: Path, overrides: Sequence[str], machines: Machines, *, as_json: bool, rehearse: bool) -> bool:
    """Plan a recipe and print the plan.

    Args:
        path: the recipe.
        overrides: ``key=value`` each.
        machines: what it is planned for.
        as_json: print JSON instead of tables.
        rehearse: also build and run one rank of some stages, on tensors without values, and compare.

    Returns:
        Whether it fits.

    Raises:
        RecipeError, LayoutError, ModelConfigError, RehearsalError, ValueError: the recipe cannot be run; names the key
            to change, or the stage that failed.
    """
    memory, again = machines.memory, _Planner(path, overrides, machines)
    plan = again()
    card = CARDS[machines.card]
    speed, verdict = estimate(plan, card), judge(plan, memory, again)
    further, estimates = {"time": show_speed.tree(speed, machines.card)}, [show_speed.table(speed, machines.card)]
    if isinstance(again.recipe, TrainRecipe):
        ways = both_ways(plan, again((other_way(plan),)), card)
        further["sharing"] = show_sharing.tree(ways)
        estimates.append(show_sharing.table(ways))
    tables = []
    if rehearse:
        from megatron_g2rpo.commands.rehearsal import show as rehearsed
        from megatron_g2rpo.commands.rehearsal.stage import rehearse as rehearse_recipe

        stages = rehearse_recipe(again.recipe, str(config_dir(again.recipe.policy.model_name)), plan.batches)
        local = again(LOCAL_MODULES)  # a rehearsal runs on the CPU
        further["rehearsal"] = rehearsed.tree(plan.recipe, local, stages)
        tables = [rehearsed.tables(plan.recipe, local, stages)]
    if as_json:
        print(show.as_json(plan, verdict, memory, further))
    else:
        Console(highlight=False, soft_wrap=True).print(show.tables(plan, verdict, memory, *estimates), *tables)
    return verdict.fits


def run_sweep(path: Path, overrides: Sequence[str], machines: Machines, gpus: int | None, *, as_json: bool) -> bool:
    """Propose layouts of a recipe for a number of GPUs, and print them, best first.

    Args:
        path, overrides, machines, as_json: see ``run``.
        gpus: number of GPUs; None for as many as the recipe has.

    Returns:
        Whether any fits.

    Raises:
        RecipeError, ModelConfigError, ValueError: the recipe, what is said of the data, or the number of GPUs cannot be
            planned.
    """
    again = _Planner(path, overrides, machines)
    again.check()  # else no layout could be planned, and larger GPUs would be advised
    count = again.recipe.world_size if gpus is None else gpus
    found = sweep(again.recipe, count, CARDS[machines.card], machines.memory, again)
    if as_json:
        print(json.dumps({"gpus": count, "proposals": show_speed.proposal_trees(found, machines.card)}, indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(show_speed.proposals(found, count, machines.card))
    return bool(found)
