# SPDX-License-Identifier: Apache-2.0
"""Interpolation: ``${section.key}``, ``${.sibling}``, ``${oc.env:NAME}`` and NeMo-RL's arithmetic, ``${mul:a,b}``.

A part of a key that has a dot or a blank stands in quotes, as on the command line: ``${env.tasks."v1.0".length}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_g2rpo.recipe.errors import Origin, RecipeError, find_origin
from megatron_g2rpo.recipe.keys import split

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


# OmegaConf's grammar has no quotes within keys: such a reference becomes a call of this resolver.
_AT = "at_key"
_QUOTED_KEY = re.compile(r"""\$\{([^${}:,.\s]+(?:\.(?:"[^"{}]+"|'[^'{}]+'|[^${}:,.\s"']+))+)\}""")


def _bracketed(value: Any) -> Any:
    """Return a tree in which references with quoted parts are calls of the resolver ``at_key``."""
    if isinstance(value, dict):
        return {key: _bracketed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_bracketed(each) for each in value]
    if isinstance(value, str) and ('"' in value or "'" in value):
        return _QUOTED_KEY.sub(_as_call, value)
    return value


def _as_call(found: re.Match[str]) -> str:
    key = found[1]
    if '"' not in key and "'" not in key:
        return found[0]
    first, *others = split(key)
    return f"${{{_AT}:'{first}{''.join(f'[{part}]' for part in others)}'}}"


def _at_key(key: str, *, _root_: Any) -> Any:
    found = OmegaConf.select(_root_, key, default=_AT)
    if isinstance(found, str) and found == _AT:
        raise KeyError(f"the interpolation names no key: {key}")
    return found


def resolve(tree: dict[str, Any], origins: Mapping[str, Origin], section: str | None = None) -> dict[str, Any]:
    """Replace every interpolation by its value.

    Args:
        tree: the keys of a recipe.
        origins: dotted key -> where it was written.
        section: name of the section to resolve and return, which may refer to others; None for the whole tree.

    Raises:
        RecipeError: an interpolation that names no key, is malformed, circular or fails; a value left at ``???``.
    """
    for name, function in _RESOLVERS.items():
        # OmegaConf's registry is global to the process: another library may hold the same names.
        # "error": `${mul:abc,2}` is a mistake, not "abcabc".
        OmegaConf.register_resolver(name, function, replace=True, annotation_validation="error")
    OmegaConf.register_resolver(_AT, _at_key, replace=True)
    try:
        config = OmegaConf.create(_bracketed(tree))
        chosen = config if section is None else config[section]
        resolved = OmegaConf.to_container(chosen, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or ""))
        # OmegaConf writes no quotes.
        quoted = {".".join(split(known)): known for known in origins if '"' in known or "'" in known}
        where = find_origin(origins, quoted.get(key, key))
        if isinstance(error, MissingMandatoryValue):
            problem = "must be given: it is ??? in the recipe"
        else:
            problem = str(error).splitlines()[0]
        raise RecipeError(f"{where}: '{key}': {problem}" if where else f"'{key}': {problem}") from error
    return cast("dict[str, Any]", resolved)
