# SPDX-License-Identifier: Apache-2.0
"""Loading of a recipe: a file and overrides become a validated recipe, or one error that lists every fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_g2rpo.recipe import exp_manager
from megatron_g2rpo.recipe.env_section import complete_tasks
from megatron_g2rpo.recipe.errors import Fault, Origin, RecipeError, find_origin, shown
from megatron_g2rpo.recipe.imports import IMPORTS, import_all
from megatron_g2rpo.recipe.interpolation import resolve
from megatron_g2rpo.recipe.keys import dotted, meaning_of_null, nearest_key
from megatron_g2rpo.recipe.layers import load_layers
from megatron_g2rpo.recipe.names import check_names
from megatron_g2rpo.recipe.paths import expand_paths
from megatron_g2rpo.recipe.schema import Recipe, SftRecipe, TrainRecipe
from megatron_g2rpo.recipe.source import Document

_KINDS: dict[str, type[TrainRecipe] | type[SftRecipe]] = {"train": TrainRecipe, "sft": SftRecipe}
_LOOP_SECTION = {"train": "grpo", "sft": "sft"}
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_NOT_A_MAPPING = {"model_type", "model_attributes_type", "dict_type", "mapping_type"}


@dataclass(frozen=True)
class Examined:
    """The result of ``examine``: a recipe as far as it could be read.

    Attributes:
        recipe: the validated recipe; None if anything is wrong with it.
        tree: all keys with plain values, even if the recipe is not valid.
        origins: dotted key -> where it was written.
        faults: messages of all faults, each with its file and line.
    """

    recipe: Recipe | None
    tree: Mapping[str, Any]
    origins: Mapping[str, Origin]
    faults: tuple[str, ...]


@overload
def load(path: str | Path, overrides: Sequence[str], kind: Literal["train"]) -> TrainRecipe: ...
@overload
def load(path: str | Path, overrides: Sequence[str], kind: Literal["sft"]) -> SftRecipe: ...
def load(path: str | Path, overrides: Sequence[str], kind: Literal["train", "sft"]) -> Recipe:
    """Load a recipe: inheritance, overrides, imports, interpolation, names, validation.

    Args:
        path: the YAML file.
        overrides: ``key=value`` each, with the value typed as YAML; applied in order, before interpolation.
        kind: purpose of the recipe: ``train`` requires the sections ``grpo`` and ``loss_fn``, ``sft`` requires ``sft``.

    Raises:
        RecipeError: the recipe cannot be used; the message lists all faults of its keys and names at once.
    """
    examined = examine(path, overrides, kind)
    if examined.recipe is not None:
        return examined.recipe
    raise RecipeError(listed(path, kind, examined.faults))


def examine(path: str | Path, overrides: Sequence[str], kind: Literal["train", "sft"]) -> Examined:
    """Load a recipe, and return its faults instead of raising them, for callers that look for further faults.

    Raises:
        RecipeError: the recipe cannot be read at all: a file is missing or not YAML, an import fails, an interpolation
            leads nowhere, or the recipe is of the other kind.
    """
    document, faults = exp_manager.apply(load_layers(Path(path), overrides))
    _refuse_other_kind(document, kind, path)
    import_all(document.tree.get(IMPORTS, []), document.origins.get(IMPORTS))
    tree = complete_tasks(resolve(document.tree, document.origins))
    tree.pop(exp_manager.SECTION, None)
    faults += [fault.located(document.origins) for fault in (*expand_paths(tree), *check_names(tree))]
    model, recipe = _KINDS[kind], None
    try:
        recipe = model.model_validate(tree)
    except ValidationError as error:
        faults += [_describe(fault, model, document) for fault in error.errors(include_url=False)]
    return Examined(None if faults else recipe, tree, document.origins, tuple(faults))


def listed(path: str | Path, kind: str, faults: Sequence[str]) -> str:
    """Return one message that lists all faults."""
    lines = [f"recipe {path} cannot be used for {kind}:", *(f"  {fault}" for fault in faults)]
    if any("missing key " in fault for fault in faults):
        lines.append("  An exemplar (defaults: vlm_g2rpo.yaml or vlm_sft.yaml) holds every key: inherit from it.")
    return "\n".join(lines)


def _refuse_other_kind(document: Document, kind: str, path: str | Path) -> None:
    for other, section in _LOOP_SECTION.items():
        if other != kind and section in document.tree and _LOOP_SECTION[kind] not in document.tree:
            where = find_origin(document.origins, section)
            raise RecipeError(f"{where}: recipe {path} has a section '{section}': it is for {other}, not for {kind}")


def _describe(fault: ErrorDetails, recipe: type[TrainRecipe] | type[SftRecipe], document: Document) -> str:
    origins = document.origins
    path = [str(part) for part in fault["loc"]]
    key, context = dotted(*path), fault.get("ctx", {})
    if fault["type"] == "conflict":
        prefix = f"{key}." if key else ""
        named = [(f"{prefix}{name}", find_origin(origins, f"{prefix}{name}")) for name in context["keys"]]
        where = ", ".join(f"{name} ({origin})" for name, origin in named)
        return f"{context['message']}; set by {where}"
    where = find_origin(origins, key)
    start = f"{where}: " if where else ""
    if fault["type"] == "extra_forbidden" and "." in path[-1]:
        return f"{start}key {key} has a dot; nest the keys, one mapping per level"
    if fault["type"] == "extra_forbidden":
        cut = _cut_name(path, document.tree)
        if cut is not None:
            return f"{start}unknown key '{key}'; a name with a dot stands in quotes: {cut}"
        return f"{start}unknown key '{key}'; nearest valid key: {nearest_key(recipe, path)}"
    if fault["type"] == "missing":
        return f"{start}missing key '{key}'"
    if fault["type"] in _NOT_A_MAPPING:
        return f"{start}'{key}' must be a mapping of keys, got {shown(fault['input'])}"
    return Fault.of(fault).located(origins) + _null(fault, recipe, path) + _hint(fault, document.tree)


def _null(fault: ErrorDetails, recipe: type[TrainRecipe] | type[SftRecipe], path: list[str]) -> str:
    """What to write for "off" or "all", which other frameworks write as a number that is out of range here."""
    meaning = meaning_of_null(recipe, path) if fault["type"] in _OUT_OF_RANGE else None
    return "" if meaning is None else f" (null: {meaning})"


def _cut_name(path: list[str], tree: Mapping[str, Any]) -> str | None:
    """Return the key of the task whose name was cut at a dot, where there is such a task."""
    section, collection, *rest = [*path, "", ""][:4]
    tasks = tree.get("env", {}).get("tasks") if (section, collection) == ("env", "tasks") else None
    if not isinstance(tasks, dict):
        return None
    name = next((name for name in tasks if name.startswith(f"{rest[0]}.")), None)
    return None if name is None else dotted("env", "tasks", name)


def _hint(fault: ErrorDetails, tree: Mapping[str, Any]) -> str:
    """What to do about a number or a truth value that an environment variable gives as text."""
    written: Any = tree
    for part in fault["loc"]:
        written = written.get(part) if isinstance(written, dict) else None
    if not isinstance(written, str) or "oc.env" not in written or not isinstance(fault["input"], str):
        return ""
    return f"; an environment variable is text: write ${{oc.decode:{written}}}"
