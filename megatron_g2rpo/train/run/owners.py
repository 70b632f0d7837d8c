# SPDX-License-Identifier: Apache-2.0
"""Whose a run directory is, and the checkpoints in one; and whether another run is at work around it.

``step_N/manifest.json`` says whose a checkpoint is, ``identity.yaml`` whose the directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rpo.train.run.files import PARTIAL, PROBE
from megatron_g2rpo.train.run.lock import LOCK_FILE, DirectoryInUseError, owner_of
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import read_manifest

IDENTITY_FILE = "identity.yaml"
REPLACED = ".replaced"  # ends the name of a checkpoint while another takes its place
LOG_DIR, CHECKPOINT_DIR = "logger.log_dir", "checkpointing.checkpoint_dir"
RUN_ID = "run_id"  # among the keys of the identity
# What an attempt may leave that ended before it claimed the directory.
_UNCLAIMED = (LOCK_FILE, IDENTITY_FILE + PARTIAL)
# As a run writes them: step_007 and step_٣ are nobody's.
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")


class RunDirectoryError(ValueError):
    """The run directory cannot be used for this recipe."""


def run_id(directory: str | Path) -> str:
    """Return the id of the run that a directory belongs to, which its checkpoints name; empty if no run claimed it.

    Raises:
        RunDirectoryError: the file that says so is damaged.
    """
    return read_identity(Path(directory)).get(RUN_ID, "")


def read_identity(directory: Path) -> dict[str, Any]:
    """Return what a directory says of its run; empty where no run has claimed it.

    Raises:
        RunDirectoryError: the file that says so is damaged.
    """
    path = directory / IDENTITY_FILE
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text())
        if not isinstance(tree, dict):
            raise ValueError(f"it holds {tree!r}, no mapping")
    except (yaml.YAMLError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} is damaged ({first_line(error)}): whose run this is cannot be known; restore the file, or pass "
            "--fresh to move the run aside"
        ) from error
    return tree


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).partition("\n")[0]


def is_unclaimed(directory: Path) -> bool:
    """Return whether a directory is new, or holds nothing but what an attempt leaves that was refused."""
    left = (path for path in directory.rglob("*") if not path.is_dir())
    return all(path.name in _UNCLAIMED or path.name.startswith(PROBE) for path in left)


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a run gives a name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(checkpoints: Path) -> dict[int, Path]:
    """Return the checkpoints in a directory, by their steps, with those that were about to be replaced."""
    paths = sorted((path for path in checkpoints.glob("step_*") if path.is_dir()), reverse=True)  # with REPLACED first
    found = ((step_of(path.name.removesuffix(REPLACED)), path) for path in paths)
    return {step: path for step, path in found if step is not None}


def owners_of(saved: Mapping[int, Path]) -> dict[str, list[str]]:
    """Return the runs that checkpoints name, and which of them.

    Those of releases up to 0.4 and damaged ones name none.
    """
    owners: dict[str, list[str]] = {}
    for _, path in sorted(saved.items()):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest is not None and manifest.run_id:
            owners.setdefault(manifest.run_id, []).append(path.name)
    return owners


def different(places: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out directories that are the same as one before, whose lock a process cannot take twice."""
    by_path: dict[Path, str] = {}
    for key, place in places.items():
        by_path.setdefault(place.resolve(), key)
    return {key: places[key] for key in by_path.values()}


def refuse_within_live(places: Mapping[str, Path]) -> None:
    """Check that no directory of a run lies within that of another one that is at work, which may move or replace it.

    Args:
        places: the run's directories, by the keys that name them.

    Raises:
        DirectoryInUseError: one does; names the key, and who is at work where.
    """
    own = {place.resolve() for place in places.values()}
    for key, place in places.items():
        for around in place.resolve().parents:
            if around in own or not os.path.exists(around / IDENTITY_FILE):
                continue
            if owner := owner_of(around):
                raise DirectoryInUseError(
                    f"{key}: {place} lies in {around}, which is in use by {owner}; name a directory outside of it"
                )


def refuse_others_within(directory: Path, held: Collection[Path]) -> None:
    """Check that a run directory that is to be moved holds no other one, at work or not.

    Args:
        directory: the directory.
        held: directories whose locks this process holds.

    Raises:
        DirectoryInUseError: somebody is at work in a directory within; names it, and who.
        RunDirectoryError: a directory within is that of another run.
    """
    own = {place.resolve() for place in (directory, *held)}
    for folder, _, names in os.walk(directory):
        place = Path(folder)
        if place.resolve() not in own and LOCK_FILE in names and (owner := owner_of(place)):
            raise DirectoryInUseError(
                f"{LOG_DIR}: {place}, which lies in {directory}, is in use by {owner}; wait for its end or end it"
            )
        if place != directory and IDENTITY_FILE in names:
            raise RunDirectoryError(
                f"{LOG_DIR}: {directory} holds another run, {place}, and is left where it is; move that elsewhere, or "
                "name another directory"
            )
