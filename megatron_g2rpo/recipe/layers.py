# SPDX-License-Identifier: Apache-2.0
"""Inheritance of recipes: ``defaults:``, ``_override_: true`` and ``key=value`` overrides, as in NeMo-RL.

A recipe names its parents under ``defaults``: one path or a list, relative to the file, or the name of an exemplar
(``exemplars/``). Parents are merged first, depth first, in order; the last one to set a key wins, and the file itself
comes last. Mappings merge key by key; everything else, lists included, replaces, but for the top-level ``imports``,
which add up. A mapping that holds ``_override_: true`` replaces the inherited one instead of merging.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_g2rpo.recipe import imports
from megatron_g2rpo.recipe.errors import Origin, RecipeError
from megatron_g2rpo.recipe.keys import KEY, is_text, quoted, split
from megatron_g2rpo.recipe.schema import SftRecipe, TrainRecipe
from megatron_g2rpo.recipe.source import Document, read_document, read_value

DEFAULTS = "defaults"
REPLACE = "_override_"
# Complete recipes, shipped with the package: they hold every key, and recipes anywhere inherit from them by name.
EXEMPLARS = Path(__file__).parent / "exemplars"


def load_layers(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Merge a recipe, everything it inherits and the overrides; interpolations are left as they are.

    Raises:
        RecipeError: a file is missing or malformed, ``defaults`` form a cycle, or an override is not ``key=value``.
    """
    merged = load_file(path)
    for override in overrides:
        merged = merge(merged, parse_override(override))
    return merged


def load_file(path: Path) -> Document:
    """Merge a recipe file over its parents."""
    merged = Document({}, {})
    for document in _lineage(path, ()):
        merged = merge(merged, document)
    return merged


def _lineage(path: Path, chain: tuple[Path, ...]) -> Iterator[Document]:
    """Return a file's parents, depth first, and the file, unmerged: ``_override_`` acts on all that precedes it."""
    own = read_document(path)
    _locate_imports(own, path.parent)
    chain = (*chain, path)
    for parent in parent_paths(path, own):
        if parent.resolve() in [file.resolve() for file in chain]:
            cycle = " -> ".join(str(file) for file in (*chain, parent))
            raise RecipeError(f"{own.origins[DEFAULTS]}: defaults form a cycle: {cycle}")
        if not parent.is_file():
            raise RecipeError(f"{own.origins[DEFAULTS]}: defaults names {parent}, which does not exist")
        yield from _lineage(parent, chain)
    own.tree.pop(DEFAULTS, None)
    own.origins.pop(DEFAULTS, None)
    yield own


def parent_paths(path: Path, document: Document) -> list[Path]:
    """Return the files that ``defaults`` names, in the order in which they are merged."""
    if DEFAULTS not in document.tree:
        return []
    names = document.tree[DEFAULTS]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"{document.origins[DEFAULTS]}: defaults must be a path or a list of paths, got {names!r}")
    return [_parent(path.parent, name) for name in names]


def _parent(directory: Path, name: str) -> Path:
    beside = Path(os.path.normpath(directory / name))
    exemplar = EXEMPLARS / name
    return exemplar if not beside.exists() and exemplar.is_file() else beside


def _locate_imports(document: Document, folder: Path) -> None:
    if imports.IMPORTS in document.tree:
        origin = document.origins[imports.IMPORTS]
        document.tree[imports.IMPORTS] = imports.as_written(document.tree[imports.IMPORTS], folder, origin)


def merge(base: Document, top: Document) -> Document:
    """Merge ``top`` over ``base`` and return the result; neither is changed."""
    origins = dict(base.origins)
    tree = _merge(base.tree, top.tree, "", origins, top.origins)
    if imports.IMPORTS in base.tree and imports.IMPORTS in top.tree:
        both = [*base.tree[imports.IMPORTS], *top.tree[imports.IMPORTS]]
        tree[imports.IMPORTS] = list(dict.fromkeys(both))
    origins.update((key, origin) for key, origin in top.origins.items() if key.rpartition(".")[2] != REPLACE)
    return Document(tree, origins, (*base.files, *top.files))


def _merge(
    base: dict[str, Any], top: dict[str, Any], prefix: str, origins: dict[str, Origin], top_origins: dict[str, Origin]
) -> dict[str, Any]:
    replace = top.get(REPLACE, False)
    if not isinstance(replace, bool):
        where = top_origins[f"{prefix}{REPLACE}"]
        raise RecipeError(f"{where}: {prefix}{REPLACE} must be true or false, got {replace!r}")
    if replace:
        _forget(origins, prefix)
    merged = {} if replace else dict(base)
    for key, value in top.items():
        if key == REPLACE:
            continue
        dotted = f"{prefix}{quoted(key)}"
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value, f"{dotted}.", origins, top_origins)
        else:
            _forget(origins, f"{dotted}.")
            merged[key] = value
    return merged


def _forget(origins: dict[str, Origin], prefix: str) -> None:
    for key in [key for key in origins if key.startswith(prefix)]:
        del origins[key]


def parse_override(text: str) -> Document:
    """Parse an override ``a.b=value`` into a document of its own; the value is typed as YAML, or text where it must be.

    Raises:
        RecipeError: the text has no ``=`` or no dotted key, or the value is empty or not YAML.
    """
    found = KEY.match(text)
    key, rest = (found.group(), text[found.end() :]) if found else ("", text)
    if text[:1] in ("+", "~"):
        raise RecipeError(f"override '{text}': write key=value without '+' or '~'; every key exists in the exemplar")
    if not key or not rest.startswith("="):
        raise RecipeError(
            f"override '{text}': expected key=value with a dotted key, such as grpo.max_num_steps=10; a name with a "
            "dot or a blank stands in quotes, 'env.tasks.\"my data\".length=null'"
        )
    value = rest[1:]
    if not value.strip():
        raise RecipeError(f"override '{text}': no value given; write {key}=null or {key}='\"\"' if you mean that")
    # Of a key that both kinds of recipe have, both say the same.
    path = split(key)
    document = read_value(value, key, text, is_text=is_text(TrainRecipe, path) or is_text(SftRecipe, path))
    _locate_imports(document, Path.cwd())
    return document
