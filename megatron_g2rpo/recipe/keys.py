# SPDX-License-Identifier: Apache-2.0
"""The valid keys of a recipe, and the valid key that is nearest to a wrong one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from megatron_g2rpo.recipe.base import Section


def dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Return every dotted key of a section, sections included; ``<task>`` stands for the keys of an open mapping."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        inner, is_open = _inner_section(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{name}.<task>." if is_open else f"{prefix}{name}.")


def nearest_key(recipe: type[Section], path: Sequence[str]) -> str:
    """Return the valid key that was most likely meant by an unknown one.

    Args:
        recipe: class of the recipe.
        path: the unknown key, split at its dots.

    Returns:
        The closest key of the same section if one is close; else a key of the same name elsewhere; else the closest
        dotted key.
    """
    *around, name = path
    section = _section_at(recipe, around)
    siblings = list(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return ".".join([*around, *close])
    everywhere = list(dotted_keys(recipe))
    names = {key.rpartition(".")[2]: key for key in reversed(everywhere)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if close:
        return names[close[0]]
    return difflib.get_close_matches(".".join(path), everywhere, n=1, cutoff=0.0)[0]


def _section_at(section: type[Section], path: Sequence[str]) -> type[Section] | None:
    """Return the section that a path leads to, also through open mappings."""
    parts = list(path)
    while parts:
        field = section.model_fields.get(parts.pop(0))
        inner, is_open = _inner_section(field.annotation) if field is not None else (None, False)
        if inner is None or (is_open and not parts):
            return None
        if is_open:
            parts.pop(0)
        section = inner
    return section


def _inner_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Return the section that a field holds, and whether the field is an open mapping of such sections."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _inner_section(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        found = [_inner_section(argument) for argument in get_args(annotation)]
        return next((pair for pair in found if pair[0] is not None), (None, False))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _inner_section(get_args(annotation)[1])[0], True
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    return None, False
