# SPDX-License-Identifier: Apache-2.0
"""Reading of one YAML text into a plain tree, with the place where every key was written."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rpo.recipe.errors import Origin, RecipeError
from megatron_g2rpo.recipe.keys import dotted, quoted, split

# Without this, YAML 1.1 reads `1e-6` as a string: it wants a dot in every float.
_FLOAT = re.compile(
    r"""^(?: [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
           | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
           | [-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
           | [-+]?\.(?:inf|Inf|INF)
           | \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)


_NULL = ("null", "Null", "NULL", "~")


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads ``1e-6`` as a float, and a date as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Document:
    """The settings of one or more YAML texts.

    Attributes:
        tree: nested plain dicts, lists and scalars.
        origins: dotted key -> where it was written, for every key of every mapping.
        files: the files that were merged, in that order; a file that two others inherit from is there twice.
    """

    tree: dict[str, Any]
    origins: dict[str, Origin]
    files: tuple[str, ...] = ()


def read_document(path: Path) -> Document:
    """Read one recipe file, without following its ``defaults``.

    Raises:
        RecipeError: the file cannot be read, is not YAML, is not a mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"recipe {path} cannot be read: {reason}") from error
    return deepcopy(_parsed(text, path))


# PyYAML takes most of the time in which a recipe is read, and all recipes read the same few exemplars.
@lru_cache(maxsize=32)
def _parsed(text: str, path: Path) -> Document:
    reader = _Reader(text, str(path), has_lines=True)
    tree = reader.read("")
    if tree is None:
        return Document({}, {}, (str(path),))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections (grpo:, policy:, ...), got {tree!r}")
    return Document(tree, reader.origins, (str(path),))


def read_value(text: str, key: str, source: str, *, is_text: bool = False) -> Document:
    """Read a command-line value by the rules of YAML files: ``3``, ``1e-6``, ``null``, ``[a, b]``, ``{low: 0.2}``.

    Args:
        text: text of the value.
        key: dotted key that the value is for.
        source: the override as it was typed, for errors.
        is_text: whether the key takes nothing but text (or null). What is neither in quotes nor in brackets is then
            taken as it stands: ``Answer: yes or no`` is no mapping.

    Raises:
        RecipeError: the value is not YAML.
    """
    key = dotted(*split(key))
    reader = _Reader(text, source, has_lines=False)
    stands = is_text and text.strip()[:1] not in ("'", '"', "[", "{") and text.strip() not in _NULL
    tree: Any = text.strip() if stands else reader.read(f"{key}.")
    for part in reversed(split(key)):
        tree = {part: tree}
    return Document(tree, {key: Origin(source), **reader.origins})


class _Reader:
    """Walks the YAML nodes of one text, because only nodes carry line numbers."""

    def __init__(self, text: str, source: str, *, has_lines: bool) -> None:
        self.text = text
        self.source = source
        self.has_lines = has_lines
        self.origins: dict[str, Origin] = {}

    def read(self, prefix: str) -> Any:
        try:
            loader = _Loader(self.text)
            root = loader.get_single_node()
            return None if root is None else self._value(loader, root, prefix, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self._origin(mark.line) if mark else self.source
            raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{self.source}: not valid YAML: {error}") from error

    def _origin(self, line: int) -> Origin:
        return Origin(self.source, line + 1 if self.has_lines else None)

    def _value(self, loader: _Loader, node: yaml.Node, prefix: str, around: tuple[yaml.Node, ...]) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        if any(node is outer for outer in around):
            raise RecipeError(f"{self._origin(node.start_mark.line)}: an alias contains itself")
        self._refuse_repeated_keys(node)
        loader.flatten_mapping(node)
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            origin = self._origin(key_node.start_mark.line)
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"{origin}: key {key!r} is not text; write it in quotes")
            self.origins[f"{prefix}{quoted(key)}"] = origin
            tree[key] = self._value(loader, value_node, f"{prefix}{quoted(key)}.", (*around, node))
        return tree

    def _refuse_repeated_keys(self, node: yaml.MappingNode) -> None:
        # PyYAML silently lets the last of two equal keys win.
        seen: dict[str, Origin] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            origin = self._origin(key_node.start_mark.line)
            if key_node.value in seen:
                raise RecipeError(f"{origin}: key '{key_node.value}' is set twice (first: {seen[key_node.value]})")
            seen[key_node.value] = origin
