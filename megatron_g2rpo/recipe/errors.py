# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a recipe, and where a value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
    """Origin of a dotted key; failing that of something below it, or of the nearest mapping or list around it."""
    if key in origins:
        return origins[key]
    below = next((origin for known, origin in origins.items() if known.startswith(f"{key}.")), None)
    if below is not None or "." not in key:
        return below
    return find_origin(origins, key.rpartition(".")[0])
