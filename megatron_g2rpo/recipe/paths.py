# SPDX-License-Identifier: Apache-2.0
"""Home directories, environment variables and ``..`` in the paths of a recipe: ``~/data``, ``$SCRATCH/run``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from megatron_g2rpo.recipe.errors import Fault

# Dotted keys of paths; of a list, its entries, and the `path` of those that are mappings.
PATH_KEYS = (
    "data.train.path",
    "data.validation.path",
    "policy.model_name",
    "policy.pretrained_checkpoint",
    "logger.log_dir",
    "checkpointing.checkpoint_dir",
)
# Of these, the directories that a run makes. The operating system finds what is behind ``new/..`` only once ``new`` is
# there: what lies in such a directory would be seen only after it was claimed.
_MADE = ("logger.log_dir", "checkpointing.checkpoint_dir")
_VARIABLE = re.compile(r"\$(\w+)")


def expand_paths(tree: dict[str, Any]) -> Iterator[Fault]:
    """Replace ``~`` and environment variables in every path of a recipe, and ``..`` in those to write to, in place.

    Args:
        tree: the keys of a recipe, interpolated.

    Yields:
        One fault for each path with a variable that is not set, which stays as it is.
    """
    for dotted in PATH_KEYS:
        *around, name = dotted.split(".")
        section: Any = tree
        for key in around:
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            continue
        try:
            section[name] = _expanded(section[name])
        except KeyError as error:
            yield Fault(
                dotted, f"'{dotted}': the environment variable {error.args[0]} of {section[name]!r} is not set here"
            )
        else:
            if dotted in _MADE:
                section[name] = _without_dots(section[name])


def expanded(path: str) -> str:
    """Return a path with its ``~`` and environment variables replaced.

    Raises:
        KeyError: a variable is not set; the error holds its name.
    """
    return os.path.expanduser(_VARIABLE.sub(lambda found: os.environ[found[1]], path))


def _without_dots(path: Any) -> Any:
    if isinstance(path, str) and os.pardir in path.split(os.sep):
        return os.path.realpath(path)
    return path


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    if isinstance(value, dict):
        return {key: _expanded(each) if key == "path" else each for key, each in value.items()}
    return value
