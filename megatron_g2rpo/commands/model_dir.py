# SPDX-License-Identifier: Apache-2.0
"""A recipe whose model lies on this machine."""

from __future__ import annotations

from typing import TypeVar

from megatron_g2rpo.models.directory import local_model_dir
from megatron_g2rpo.recipe import Recipe

R = TypeVar("R", bound=Recipe)


def with_local_model(recipe: R) -> R:
    """The recipe with ``policy.model_name`` as a directory.

    Raises:
        FileNotFoundError: see ``local_model_dir``.
    """
    policy = recipe.policy.model_copy(update={"model_name": str(local_model_dir(recipe.policy.model_name))})
    return recipe.model_copy(update={"policy": policy})
