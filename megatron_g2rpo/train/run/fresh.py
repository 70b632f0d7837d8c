# SPDX-License-Identifier: Apache-2.0
"""``--fresh``: what an earlier run left is renamed, nothing is deleted, and nothing is moved that is another run's."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run.lock import LOCK_FILE, Lock
from megatron_g2rpo.train.run.owners import (
    CHECKPOINT_DIR,
    IDENTITY_FILE,
    LOG_DIR,
    RunDirectoryError,
    different,
    is_unclaimed,
    owners_of,
    refuse_others_within,
    run_id,
    steps_in,
)


def set_aside(recipe: Recipe) -> None:
    """Rename what an earlier run left in the directories that a recipe names.

    Raises:
        DirectoryInUseError: somebody is at work there, or in a directory within.
        RunDirectoryError: what is there is another run's, or no run's.
    """
    directory, checkpoints = Path(recipe.logger.log_dir), Path(recipe.checkpointing.checkpoint_dir)
    places = different({LOG_DIR: directory, CHECKPOINT_DIR: checkpoints})
    with ExitStack() as held:
        for key, place in places.items():
            if (place / LOCK_FILE).exists():
                held.enter_context(Lock(place, key))
        if not (directory / IDENTITY_FILE).exists() and not is_unclaimed(directory):
            raise RunDirectoryError(
                f"{LOG_DIR}: {directory} holds files, but no {IDENTITY_FILE}: it is not a run directory, and is left "
                "where it is; name another"
            )
        refuse_others_within(directory, places.values())
        # By name: where a link in the run directory leads to the checkpoints, it is moved, and leads there still.
        within = checkpoints.absolute().is_relative_to(directory.absolute())
        _check_owner(checkpoints, directory, within=within)
        if not within:
            _check_holds_no_more(checkpoints)
            move_aside(checkpoints)
        move_aside(directory)


def _check_owner(checkpoints: Path, directory: Path, *, within: bool) -> None:
    """Raise if checkpoints are another run's than the run directory."""
    owners = owners_of(steps_in(checkpoints))
    try:
        known = run_id(directory)
    except RunDirectoryError:
        if within and len(owners) <= 1:
            return  # nobody else's, by the place where they are
        known = ""
    foreign = [theirs for theirs in owners if theirs != known]
    if foreign:
        raise RunDirectoryError(
            f"{CHECKPOINT_DIR}: {checkpoints} holds checkpoints of run {', '.join(foreign)}, which is not that of "
            f"{directory}, and is left where it is; name another"
        )


def _check_holds_no_more(checkpoints: Path) -> None:
    """Raise if a directory of checkpoints, which is not in the run directory, holds anything else."""
    others = [
        path.name for path in checkpoints.glob("*") if path.name != LOCK_FILE and not path.name.startswith("step_")
    ]
    if others:
        raise RunDirectoryError(
            f"{CHECKPOINT_DIR}: {checkpoints} holds more than checkpoints ({', '.join(sorted(others)[:3])}), and is "
            "left where it is; name another, or move the checkpoints away yourself"
        )


def move_aside(path: Path) -> None:
    """Rename a directory by the time of its last change, if anything is in it; nothing is deleted."""
    if path.exists() and any(each.name != LOCK_FILE for each in path.iterdir()):
        stamp = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        path.rename(_free(path.with_name(f"{path.name}.{stamp}")))


def _free(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
