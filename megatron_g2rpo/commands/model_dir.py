# SPDX-License-Identifier: Apache-2.0
"""Where ``policy.model_name`` lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megatron_g2rpo.recipe import Recipe

R = TypeVar("R", bound=Recipe)


def local_model_dir(name: str) -> Path:
    """The directory of a model: the path itself, or the hub's snapshot, downloaded if need be.

    Raises:
        FileNotFoundError: neither; names what was looked for.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"policy.model_name: {name} is neither a directory nor a model that the Hugging Face hub gives ({error})"
        ) from error


def with_local_model(recipe: R) -> R:
    """The recipe with ``policy.model_name`` as a directory."""
    policy = recipe.policy.model_copy(update={"model_name": str(local_model_dir(recipe.policy.model_name))})
    return recipe.model_copy(update={"policy": policy})
