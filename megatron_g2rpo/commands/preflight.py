# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a run, before any process is started: its recipe, its model, its data.

What can be known without building anything is looked at whole, so that one look says all of it: ``--dry-run`` with a
wrong name, model and dataset names all three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.model_dir import local_model_dir
from megatron_g2rpo.data.dataset import open_dataset
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.stream import complete_weights
from megatron_g2rpo.policy.layouts.layout import LayoutError, check_model_dir
from megatron_g2rpo.recipe import Examined, Recipe, RecipeError, SftRecipe, TrainRecipe
from megatron_g2rpo.recipe.errors import Fault
from megatron_g2rpo.recipe.validation_metrics import unmeasured
from megatron_g2rpo.weights import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.checkpoint_metadata import read_metadata

# What the hub would be asked for; anything else that is no directory is a mistake.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# The key that a layout error names, so that its line can be shown.
_MEGATRON_KEY = re.compile(r"policy\.megatron_cfg\.\w+")


@overload
def checked(path: Path, overrides: Sequence[str], kind: Literal["train"], *, download: bool) -> TrainRecipe: ...
@overload
def checked(path: Path, overrides: Sequence[str], kind: Literal["sft"], *, download: bool) -> SftRecipe: ...
@overload
def checked(path: Path, overrides: Sequence[str], kind: Literal["train", "sft"], *, download: bool) -> Recipe: ...
def checked(path: Path, overrides: Sequence[str], kind: Literal["train", "sft"], *, download: bool) -> Recipe:
    """The recipe of a run that can start, as far as can be told.

    Args:
        path, overrides, kind: the recipe to load, as for ``recipe.load``.
        download: get a model that is none of this machine's from the hub; its name is taken on trust otherwise.

    Raises:
        RecipeError: with all that is wrong.
    """
    examined = recipes.examine(path, overrides, kind)
    faults = [*examined.faults, *_located(examined, _model(examined, download)), *_located(examined, _data(examined))]
    if faults or examined.recipe is None:
        raise RecipeError(recipes.listed(path, kind, faults))
    return examined.recipe


def _located(examined: Examined, faults: Iterator[Fault]) -> list[str]:
    return [fault.located(examined.origins) for fault in faults]


def _model(examined: Examined, download: bool) -> Iterator[Fault]:
    key, name = "policy.model_name", _value(examined, "policy", "model_name")
    if not isinstance(name, str) or not name:
        return  # the recipe's own fault
    if not download and not Path(name).is_dir():
        if not _HUB_NAME.fullmatch(name):
            yield Fault(key, f"{key}: {name} is neither a directory nor the ORGANISATION/NAME of a model on the hub")
        return
    try:
        directory = local_model_dir(name)
    except FileNotFoundError as error:
        yield Fault(key, str(error))
        return
    if examined.recipe is None:
        return  # its layout may be what is wrong
    try:
        check_model_dir(directory, examined.recipe.policy.megatron_cfg)
    except LayoutError as error:
        named = _MEGATRON_KEY.search(str(error))
        yield Fault(named.group() if named else key, str(error))
    except (OSError, ValueError) as error:
        yield Fault(key, f"{key}: {directory} is not a model directory ({error})")
        return
    yield from _model_files(directory, examined.recipe)


def _model_files(directory: Path, recipe: Recipe) -> Iterator[Fault]:
    """What is wrong with a model's tokenizer, processor and weights, of which only the headers are read."""
    key, checkpoint = "policy.model_name", recipe.policy.pretrained_checkpoint
    try:
        ChatProcessor(directory, recipe.data.min_pixels, recipe.data.max_pixels)
    except DataError as error:
        yield Fault(key, f"{key}: {error}")
    try:
        if checkpoint is not None:
            key = "policy.pretrained_checkpoint"
            read_metadata(Path(checkpoint))
        elif recipe.policy.init == "pretrained":
            SafetensorsDirectory(directory)
    except CheckpointError as error:
        yield Fault(key, f"{key}: {error}")


def _data(examined: Examined) -> Iterator[Fault]:
    recipe = examined.recipe
    for part in ("train", "validation"):
        key, listed, indices = f"data.{part}.path", _value(examined, "data", part, "path"), []
        entries = listed if isinstance(listed, list) else [listed]
        for entry in entries:
            path = entry.get("path") if isinstance(entry, dict) else entry
            if not isinstance(path, str) or not path:
                continue  # the recipe's own fault, or no dataset at all
            try:
                indices.append(open_dataset(path, None if recipe is None else recipe.env))
            except DataError as error:
                yield Fault(key, f"{key}: {error}")
        if indices and len(indices) == len(entries):
            try:
                mixture = Mixture(indices)
                if recipe is not None and part == "train":
                    key = "data.task_weights"
                    complete_weights(mixture, recipe.data.task_weights)
                elif recipe is not None and (why := unmeasured(recipe.checkpointing.metric_name, mixture.tasks)):
                    yield Fault("checkpointing.metric_name", why)
            except DataError as error:
                yield Fault(key, f"{key}: {error}")


def _value(examined: Examined, *keys: str) -> Any:
    tree: Any = examined.tree
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
