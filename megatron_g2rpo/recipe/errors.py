# SPDX-License-Identifier: Apache-2.0
"""Errors of recipes, and the origin of each value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from megatron_g2rpo.recipe.keys import dotted, quoted, split


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where a key was written.

    Attributes:
        source: path of a YAML file, or the override as typed on the command line.
        line: line of the key in that file, 1-based; None for an override.
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return f"override '{self.source}'" if self.line is None else f"{self.source}:{self.line}"


def find_origin(origins: Mapping[str, Origin], key: str) -> Origin | None:
    """Return the origin of a dotted key, else that of a key below it, else that of the nearest key around it."""
    if key in origins:
        return origins[key]
    below = next((origin for known, origin in origins.items() if known.startswith(f"{key}.")), None)
    *around, _ = split(key)
    if below is not None or not around:
        return below
    return find_origin(origins, dotted(*around))


@dataclass(frozen=True)
class Fault:
    """One error of a recipe.

    Attributes:
        key: the dotted key that is wrong; the message begins with the place where it was written.
        message: what is wrong, and what to do.
    """

    key: str
    message: str

    @classmethod
    def of(cls, error: ErrorDetails, where: str = "") -> Fault:
        """Return the fault for a value that pydantic refuses.

        Args:
            error: pydantic's error.
            where: dotted key of the section that was validated; empty for the whole recipe.
        """
        key = ".".join([*([where] if where else []), *map(quoted, map(str, error["loc"]))])
        return cls(key, f"'{key}': {error['msg']}, got {shown(error['input'])}")

    def located(self, origins: Mapping[str, Origin]) -> str:
        """Return the message, preceded by the file and line, or the override, that the key comes from."""
        origin = find_origin(origins, self.key)
        return self.message if origin is None else f"{origin}: {self.message}"


def shown(value: Any) -> str:
    """Return a value and its type as text for error messages."""
    text = "null" if value is None else repr(value)
    return f"{text} ({type(value).__name__})"
