# SPDX-License-Identifier: Apache-2.0
"""Removes what a killed job left of a checkpoint, and what a run keeps no longer, if it is the run's and can be."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_g2rpo.train.run.checkpoint_writing import CheckpointWriteError
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import MANIFEST, read_manifest

# Seconds in which ranks whose launcher was killed have noticed it, and ended.
_OUTLIVED_S = 15.0
# What the removal of a directory raises while another process writes into it, or has a file of it open on NFS.
_IN_USE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY)


def is_left_by(run_id: str, partial: Path) -> bool:
    """Return whether a run may remove a checkpoint that is not finished: it names the run, or nothing is in it."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    try:
        if all(path.name.startswith(MANIFEST) for path in partial.iterdir()):  # also one half-written
            return True
        manifest = read_manifest(partial)
    except (CheckpointError, OSError):
        return False
    return manifest is not None and manifest.run_id == run_id


def aside(place: Path) -> Path:
    """Return a free name beside a damaged checkpoint, to which it is renamed, so that nothing goes on from it."""
    number = 1
    while os.path.lexists(free := place.with_name(f"{place.name}.damaged-{number}")):
        number += 1
    return free


def remove_tree(place: Path) -> None:
    """Remove a checkpoint; of one that is a link, the link alone.

    The manifest goes last: what is left when this is cut short says still whose it is.

    Raises:
        OSError: it cannot be removed.
    """
    if place.is_symlink():
        place.unlink()
        return
    stays: list[OSError] = []
    for path in sorted(place.iterdir()):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink(missing_ok=True)
        except OSError as error:
            stays.append(error)  # the others go: it is for their room
    if stays:
        raise stays[0]
    shutil.rmtree(place)


def remove_unfinished(partial: Path) -> None:
    """Remove what a job left that was killed while it saved, if it left anything.

    Where its launcher was killed, its ranks may write for some seconds more: so long this tries again.

    Raises:
        CheckpointWriteError: another process still writes there; names the directory.
        OSError: it cannot be removed for another reason.
    """
    deadline = time.monotonic() + _OUTLIVED_S
    while os.path.lexists(partial):
        try:
            remove_tree(partial)
        except OSError as error:
            if error.errno not in _IN_USE:
                raise
            if time.monotonic() > deadline:
                raise CheckpointWriteError(
                    f"{partial} cannot be removed, as another process writes there ({error.strerror}): a rank of an "
                    "earlier job, perhaps on another node, has outlived it; end that process, and start the command "
                    "again"
                ) from error
            time.sleep(0.1)


def cannot(place: Path, error: OSError) -> str:
    """Return a warning that a checkpoint could not be removed, and why."""
    why = error.strerror or type(error).__name__
    what = f" ({error.filename})" if error.filename and str(error.filename) != str(place) else ""
    return f"warning: {place} cannot be removed and takes up room: {why}{what}; remove it yourself"


def removed(place: Path, remove: Callable[[Path], None] = remove_tree) -> str:
    """Remove a checkpoint that the run needs no longer, if that is possible: nothing may end for one that stays.

    Returns:
        What the user must know of it, else nothing: that it stays, and why; or that it was a link, and to what.
    """
    link = f"{place} was a link to {os.readlink(place)}, which stays" if place.is_symlink() else ""
    try:
        remove(place)
    except CheckpointWriteError as error:
        return f"warning: {error}"
    except OSError as error:
        return cannot(place, error)
    return link
