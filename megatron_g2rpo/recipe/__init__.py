# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files -> validated, frozen settings of a run.

``load`` reads a file, everything it inherits and the command line's overrides; ``fingerprint`` names the run that a
recipe defines; ``dump`` writes a recipe out in full. Attribute names are the YAML keys.
"""

from megatron_g2rpo.recipe.env_section import Env, Task, Trapezoid
from megatron_g2rpo.recipe.errors import RecipeError
from megatron_g2rpo.recipe.generation_section import VllmServerConfig
from megatron_g2rpo.recipe.identity import describe_layout, dump, fingerprint, flatten, identity, may_change, settings
from megatron_g2rpo.recipe.layers import EXEMPLARS
from megatron_g2rpo.recipe.load import Examined, examine, listed, load
from megatron_g2rpo.recipe.policy_section import (
    DistributedDataParallelConfig,
    MegatronConfig,
    Optimizer,
    Policy,
    Scheduler,
)
from megatron_g2rpo.recipe.schema import Recipe, SftRecipe, TrainRecipe

__all__ = [
    "EXEMPLARS",
    "DistributedDataParallelConfig",
    "Env",
    "Examined",
    "MegatronConfig",
    "Optimizer",
    "Policy",
    "Recipe",
    "RecipeError",
    "Scheduler",
    "SftRecipe",
    "Task",
    "TrainRecipe",
    "Trapezoid",
    "VllmServerConfig",
    "describe_layout",
    "dump",
    "examine",
    "fingerprint",
    "flatten",
    "identity",
    "listed",
    "load",
    "may_change",
    "settings",
]
