# SPDX-License-Identifier: Apache-2.0
"""Interpolation: ``${section.key}``, ``${.sibling}``, ``${oc.env:NAME}`` and NeMo-RL's arithmetic, ``${mul:a,b}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_g2rpo.recipe.errors import Origin, RecipeError, find_origin

Number = int | float


def _add(a: Number, b: Number) -> Number:
    return a + b


def _subtract(a: Number, b: Number) -> Number:
    return a - b


def _multiply(a: Number, b: Number) -> Number:
    return a * b


def _divide(a: Number, b: Number) -> Number:
    """Divide; the result of two ints is an int where it is exact, so that a quotient can be a batch size."""
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


def _larger(a: Number, b: Number) -> Number:
    return max(a, b)


_RESOLVERS: dict[str, Callable[[Number, Number], Number]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "max": _larger,
}


def resolve(tree: dict[str, Any], origins: Mapping[str, Origin]) -> dict[str, Any]:
    """Replace every interpolation by its value.

    Raises:
        RecipeError: an interpolation that names no key, is malformed, circular or fails; a value left at ``???``.
    """
    for name, function in _RESOLVERS.items():
        # OmegaConf's registry is global to the process: another library may hold the same names.
        # "error": `${mul:abc,2}` is a mistake, not "abcabc".
        OmegaConf.register_resolver(name, function, replace=True, annotation_validation="error")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or ""))
        where = find_origin(origins, key)
        if isinstance(error, MissingMandatoryValue):
            problem = "must be given: it is ??? in the recipe"
        else:
            problem = str(error).splitlines()[0]
        raise RecipeError(f"{where}: '{key}': {problem}" if where else f"'{key}': {problem}") from error
    return cast("dict[str, Any]", resolved)
