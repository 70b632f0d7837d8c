# SPDX-License-Identifier: Apache-2.0
"""Whose a directory of weights is: nothing is replaced or removed that was not written here, by the same run.

A marker in an export says which run wrote it, and what: every file, link and folder, by what it holds. While the export
is being written the marker is there already, without files, so that what a job left that was killed can be told from
what is somebody's.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_g2rpo.weights.files import naming
from megatron_g2rpo.weights.manifest import sync, sync_directory

MARKER = ".megatron_g2rpo.json"
_PARTIAL_MARKER = f"{MARKER}.partial"
_REPLACED = ".replaced-"  # and a number of its own
_SHOWN = 3  # names in a message
_LONGEST_HEADER = 100_000_000  # bytes: the most that the safetensors library reads


class NotOursError(FileExistsError):
    """A directory is in the way that this run did not write, or that holds what it did not write."""


def partial_path(directory: str | Path) -> Path:
    """Return the path at which a directory is written before it is renamed to its place."""
    return Path(directory).with_name(Path(directory).name + ".partial")


@dataclass(frozen=True)
class Owner:
    """Whose directories may be replaced.

    Attributes:
        run_id: the run, see ``train.run.owners.run_id``; empty for a command that is no run's, which replaces
            nothing.
    """

    run_id: str = ""

    def check(self, directory: Path) -> None:
        """Check that a directory may be written: it does not exist, or is a finished export of this run and no more.

        Raises:
            NotOursError: it is something else, or where it is written first there is something else; says what to do.
        """
        self._check_place(directory)
        partial = partial_path(directory)
        if os.path.lexists(partial) and not _is_unfinished(partial) and self._not_ours(partial):
            raise NotOursError(
                f"{partial} is in the way, where {directory} is written first, and no export that was interrupted; "
                "move it elsewhere"
            )

    def begin(self, directory: Path) -> Path:
        """Make the empty directory to write into, and return it; what a killed job left there is removed.

        Raises:
            NotOursError: see ``check``.
        """
        self.check(directory)
        partial = partial_path(directory)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        self._mark(partial, None)
        return partial

    def publish(self, directory: Path) -> None:
        """Give what was written since ``begin`` its name, when all of it is on the disk.

        At every moment the whole old or the whole new one is there, under its name or beside it.

        Raises:
            NotOursError: see ``check``; what was written stays beside it.
        """
        partial = partial_path(directory)
        sync_directory(partial)
        self._mark(partial, {path: _content(partial / path) for path in _paths(partial)})
        for path in (partial / MARKER, partial):
            sync(path)
        self._check_place(directory)
        if directory.exists():
            directory.rename(directory.with_name(f"{directory.name}{_REPLACED}{uuid.uuid4().hex[:8]}"))
        partial.rename(directory)
        sync(directory.parent)
        # With it go those of jobs that were killed before they came to this.
        for old in directory.parent.glob(f"{glob.escape(directory.name)}{_REPLACED}*"):
            if not self._not_ours(old):
                shutil.rmtree(old)

    def _check_place(self, directory: Path) -> None:
        if os.path.lexists(directory) and (why := self._not_ours(directory)):
            raise NotOursError(f"{directory} exists already and is not replaced: {why}; move it elsewhere")

    def _mark(self, directory: Path, files: dict[str, str] | None) -> None:
        content = {"written_by": f"megatron-g2rpo {version('megatron-g2rpo')}", "run_id": self.run_id, "files": files}
        partial = directory / _PARTIAL_MARKER
        try:
            with naming(directory / MARKER):
                partial.write_text(json.dumps(content, indent=1) + "\n")
                partial.replace(directory / MARKER)  # whole or as before: without one, nobody knows whose this is
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _not_ours(self, directory: Path) -> str:
        """Why a directory is no finished export of this run; empty if it is one."""
        if directory.is_symlink():
            return f"it is a link to {os.readlink(directory)}"
        if not directory.is_dir():
            return "it is no directory"
        marker = _marker(directory)
        if marker is None:
            return f"it has no {MARKER}, by which a run knows what it wrote"
        if not self.run_id or marker["run_id"] != self.run_id:
            return "another run or command wrote it"
        written = marker["files"] or {}
        if others := [path for path in _paths(directory) if path not in written]:
            return f"it holds what this run did not write ({_listed(others)})"
        if changed := [path for path in _paths(directory) if _content(directory / path) != written[path]]:
            return f"it was changed after this run wrote it ({_listed(changed)})"
        return ""


def _is_unfinished(partial: Path) -> bool:
    """Whether a directory is what an export left that was killed, of whichever run."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    marker = _marker(partial)
    return marker["files"] is None if marker else {path.name for path in partial.iterdir()} <= {_PARTIAL_MARKER}


def _marker(directory: Path) -> dict[str, Any] | None:
    """What a directory's marker says; None where there is none, or none that can be read."""
    try:
        content = json.loads((directory / MARKER).read_text())
        return {"run_id": content["run_id"], "files": content["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _paths(directory: Path) -> Iterator[str]:
    """Paths, within a directory, of all that is in it but its marker, folders and links included, in order."""
    for folder, folders, names in sorted(os.walk(directory)):
        for name in sorted([*folders, *names]):
            path = Path(folder, name).relative_to(directory).as_posix()
            if path != MARKER:
                yield path


def _content(path: Path) -> str:
    """What tells a file, link or folder from another in its place.

    Of a safetensors file that is its size and the digest of its header, which names every tensor with its place: the
    whole would be read at every start of a run, 16 GB for a model of 8B. What is edited by hand is the small files.
    """
    kind = path.lstat()
    if stat.S_ISLNK(kind.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(kind.st_mode):
        return "folder" if stat.S_ISDIR(kind.st_mode) else "special file"
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
    return f"{kind.st_size} bytes, header's sha256 {hashlib.sha256(length + header).hexdigest()}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
