# SPDX-License-Identifier: Apache-2.0
"""The run directory belongs to one recipe: it is claimed, continued or refused before the loop starts."""

from __future__ import annotations

import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run.logs import METRICS_FILE
from megatron_g2rpo.train.run.model_fingerprint import model_fingerprint

RECIPE_FILE, IDENTITY_FILE = "recipe.yaml", "identity.yaml"
SHOWN_DIFFERENCES = 5
# Of the keys of a recipe; releases up to 0.1 wrote none.
_VERSION, VERSION = "identity_version", 2
_MODEL = "model_fingerprint"
_RUN_ID = "run_id"
_NEW_OF_TASKS = ("response_format", "reward_weights")


class RunDirectoryError(ValueError):
    """The run directory cannot be used for this recipe."""


def prepare(recipe: Recipe, *, fresh: bool) -> list[str]:
    """Claim the run directory for a recipe; one process of the job calls it before the loop starts.

    An empty or new directory is claimed, and so is one that an attempt left without a result. One of the same recipe
    (layout, logging and length of the run aside) is continued. ``fresh`` renames what an earlier run left; nothing is
    deleted.

    Returns:
        A line for the user if the continuation has changed keys that it may change; else nothing.

    Raises:
        RunDirectoryError: the directory belongs to another recipe (the keys that differ are named), holds files that
            are no run's, or is new while ``checkpointing.checkpoint_dir``, elsewhere, holds checkpoints.
    """
    directory, checkpoints = Path(recipe.logger.log_dir), Path(recipe.checkpointing.checkpoint_dir)
    if fresh:
        for path in (checkpoints, directory):
            move_aside(path)
    identity = {**recipes.identity(recipe), _MODEL: model_fingerprint(recipe.policy.model_name)}
    notes: list[str] = []
    claimed = directory / IDENTITY_FILE
    known = uuid.uuid4().hex
    has_checkpoints = any(checkpoints.glob("step_*"))
    if claimed.exists():
        if has_checkpoints or (directory / METRICS_FILE).exists():
            before = yaml.safe_load(claimed.read_text())
            known = before.pop(_RUN_ID, known)
            _check_same(identity, before, directory)
            notes = _changed(recipe, directory / RECIPE_FILE)
    elif directory.exists() and any(directory.iterdir()):
        raise RunDirectoryError(
            f"logger.log_dir: {directory} holds files, but no {IDENTITY_FILE}: it is not a run directory; name another"
        )
    elif has_checkpoints:
        raise RunDirectoryError(
            f"checkpointing.checkpoint_dir: {checkpoints} holds checkpoints, but {directory} is a new run directory; "
            "name another for either, or pass --fresh to move the checkpoints aside"
        )
    directory.mkdir(parents=True, exist_ok=True)
    claimed.write_text(yaml.safe_dump({**identity, _VERSION: VERSION, _RUN_ID: known}, sort_keys=True))
    (directory / RECIPE_FILE).write_text(recipes.dump(recipe))
    return notes


def run_id(directory: str | Path) -> str:
    """Return the id of the run that a directory belongs to, which its checkpoints name; empty if no run claimed it."""
    claimed = Path(directory) / IDENTITY_FILE
    tree: dict[str, Any] = yaml.safe_load(claimed.read_text()) if claimed.exists() else {}
    return tree.get(_RUN_ID, "")


def _changed(recipe: Recipe, before: Path) -> list[str]:
    """Say which keys differ from those that the run had before; all may."""
    if not before.exists():
        return []
    mine, theirs = recipes.settings(recipe), recipes.flatten(yaml.safe_load(before.read_text()))
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if not keys:
        return []
    shown = "; ".join(f"{key}: {theirs.get(key)} before, {mine.get(key)} now" for key in keys[:SHOWN_DIFFERENCES])
    more = f" and {len(keys) - SHOWN_DIFFERENCES} more" if len(keys) > SHOWN_DIFFERENCES else ""
    return [f"the run goes on with other settings ({shown}{more})"]


def move_aside(path: Path) -> None:
    """Rename a directory, if it exists, by the time of its last change; nothing is deleted."""
    if path.exists():
        stamp = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        path.rename(_free(path.with_name(f"{path.name}.{stamp}")))


def _free(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _check_same(mine: dict, theirs: dict, directory: Path) -> None:
    known = mine.keys() | theirs.keys()
    if theirs.get(_VERSION) != VERSION:
        # Keys that a release up to 0.1 did not have, or had otherwise; tasks and weights it named as today's do.
        tasks = {key for key in known if key.startswith("env.tasks.") and key.rpartition(".")[2] not in _NEW_OF_TASKS}
        weights = {key for key in theirs if key.startswith("env.reward_weights.")} - {"env.reward_weights.structure"}
        known = (mine.keys() & theirs.keys()) | tasks | weights
    # Keys that an earlier release counted, and that may change by now.
    known = {key for key in known if key in mine or not recipes.may_change(key)} - {_VERSION, _MODEL}
    if mine[_MODEL] is not None and mine[_MODEL] == theirs.get(_MODEL):
        known -= {"policy.model_name"}  # the same model at another place
    # An empty mapping, too, is what a release had that did not know the key.
    keys = sorted(key for key in known if mine.get(key, {}) != theirs.get(key, {}) and mine.get(key) != theirs.get(key))
    if not keys:
        return
    shown = "; ".join(f"{key}: {theirs.get(key)} there, {mine.get(key)} here" for key in keys[:SHOWN_DIFFERENCES])
    more = f" and {len(keys) - SHOWN_DIFFERENCES} more" if len(keys) > SHOWN_DIFFERENCES else ""
    raise RunDirectoryError(
        f"logger.log_dir: {directory} belongs to another recipe ({shown}{more}); set logger.log_dir to a new "
        "directory, or pass --fresh to move the earlier run aside"
    )
