# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo doctor``: what this machine has, whether it can be used, and what a recipe would run on here.

``findings`` is the report's form; ``environment`` looks at hardware and packages, ``lock`` at versions, and
``kernels`` at a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_g2rpo.commands.doctor import environment, kernels, lock
from megatron_g2rpo.commands.doctor.findings import Finding, as_json, tables, usable
from megatron_g2rpo.plan.planner import load_recipe
from megatron_g2rpo.policy.device import Device, DeviceError, select
from megatron_g2rpo.policy.environment import set_environment
from megatron_g2rpo.policy.machine import this_machine
from megatron_g2rpo.policy.transformer_engine_probe import Answer, ask
from megatron_g2rpo.recipe import Recipe


def run(path: Path | None, overrides: Sequence[str], *, json: bool) -> bool:
    """Examine this machine, and a recipe on it, and print the report.

    Args:
        path: the recipe, of training or of a warm start; None: the machine alone.
        overrides: ``key=value`` each.
        json: print JSON instead of tables.

    Returns:
        Whether all that is needed is there and works.

    Raises:
        RecipeError: the recipe cannot be read.
    """
    recipe = None if path is None else load_recipe(path, overrides)
    found = examine(recipe)
    if json:
        print(as_json(found, path))
    else:
        Console(highlight=False).print(tables(found))
    return usable(found)


def examine(recipe: Recipe | None) -> list[Finding]:
    """Return all that there is to say about this machine, and about a recipe on it."""
    if recipe is not None:
        set_environment(recipe.policy.megatron_cfg.env_vars)
    device, refused = _device(recipe)
    machine = this_machine(device)
    wanted = None if recipe is None else kernels.wanted(recipe, device, machine)
    answer = ask(None if wanted is None else wanted.attention) if machine.packages["transformer_engine"] else None
    found = [
        *environment.hardware_findings(device),
        *environment.package_findings(machine, answer, kernels.needed_packages(recipe)),
        *lock.findings(machine),
    ]
    if answer is not None and _works(answer):
        found += kernels.transformer_engine_findings(answer, device)
    if wanted is not None:
        found += kernels.findings(wanted, refused, answer)
    return found


def _device(recipe: Recipe | None) -> tuple[Device, str | None]:
    """The device of a recipe, or the one that there is and why the recipe cannot have its own."""
    try:
        return select("auto" if recipe is None else recipe.cluster.device), None
    except DeviceError as error:
        return select(), str(error)


def _works(answer: Answer) -> bool:
    return answer.core_error is None and answer.torch_error is None
