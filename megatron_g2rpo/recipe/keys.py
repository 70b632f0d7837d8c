# SPDX-License-Identifier: Apache-2.0
"""Dotted keys: written, split, the valid ones of a recipe, and the valid one that is nearest to a wrong one.

A part of a key that holds a dot, such as a task's name, stands in quotes: ``env.tasks."mathvista_v1.0".length``.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from megatron_g2rpo.recipe.base import Section

# A part in quotes, or without what would make it end elsewhere or be read as an option of the command line.
PART = r"""(?:"[^"]+"|'[^']+'|[^\s."'=\-][^\s."'=]*)"""
KEY = re.compile(rf"{PART}(?:\.{PART})*")
_PART = re.compile(r"""(?:"[^"]+"|'[^']+')(?=\.|$)|[^.]+""")


def dotted(*parts: str | int) -> str:
    """Return the parts as one dotted key, with quotes around those that hold a dot or a quote."""
    return ".".join(quoted(str(part)) for part in parts)


def quoted(part: str) -> str:
    """Return one part of a key in the form that it has in a dotted key."""
    if "." not in part and '"' not in part:
        return part
    return f'"{part}"' if '"' not in part else f"'{part}'"


def split(key: str) -> list[str]:
    """Return the parts of a dotted key, without quotes: the inverse of ``dotted``."""
    parts = _PART.findall(key)
    return [part[1:-1] if len(part) > 2 and part[0] == part[-1] and part[0] in "\"'" else part for part in parts]


def is_text(recipe: type[Section], path: Sequence[str]) -> bool:
    """Return whether the value of a key is text, or text or null, and nothing else; also in an open mapping of text."""
    *around, name = path
    section = _section_at(recipe, around)
    if section is None and around:
        *around, mapping = around
        section = _section_at(recipe, around)
        field = section.model_fields.get(mapping) if section is not None else None
        return field is not None and get_origin(field.annotation) is dict and _is_text(get_args(field.annotation)[1])
    field = section.model_fields.get(name) if section is not None else None
    return field is not None and _is_text(field.annotation)


def meaning_of_null(recipe: type[Section], path: Sequence[str]) -> str | None:
    """Return what null means as the value of a key, in the words of its description; None if it says nothing."""
    section = _section_at(recipe, path[:-1])
    field = section.model_fields.get(path[-1]) if section is not None else None
    description = (field.description if field is not None else None) or ""
    _, said, meaning = " ".join(description.split()).partition("null: ")
    return meaning.partition(". ")[0].rstrip(".") if said else None


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
        return bool(arguments) and all(_is_text(argument) for argument in arguments)
    return annotation is str


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
        return dotted(*around, *close)
    everywhere = list(dotted_keys(recipe))
    names = {key.rpartition(".")[2]: key for key in reversed(everywhere)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if close:
        return names[close[0]]
    return difflib.get_close_matches(dotted(*path), everywhere, n=1, cutoff=0.0)[0]


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
