# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: whose it is, and what every file of it must be, so that damage is noticed.

A file system that loses power, a disk that fills and a copy that breaks off leave files that look whole. A manifest is
written last, and names size and digest of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_g2rpo.weights.files import naming
from megatron_g2rpo.weights.safetensors_directory import CheckpointError

MANIFEST = "manifest.json"
# In a checkpoint of a run: its recipe. No release wrote that without a manifest beside it.
RECIPE_FILE = "recipe.yaml"
_FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes:
        size: number of bytes.
        sha256: digest of the bytes, in hexadecimal.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read a file and say what it is."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(size=file.tell(), sha256=digest)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        run_id: the run that wrote it.
        step: number of steps that were completed.
        version: the release of this package that wrote it.
        metrics: metrics of the last validation at or before the step, by which the best checkpoints are kept.
        files: path within the checkpoint -> what the file must be, of every file but the manifest.
        seconds: time that the slowest rank took to write it; None in manifests that do not say.
    """

    run_id: str
    step: int
    version: str
    metrics: Mapping[str, float]
    files: Mapping[str, FileRecord]
    seconds: float | None = None


def records(directory: Path, paths: Iterable[str]) -> dict[str, FileRecord]:
    """Read files of a directory, by their paths within it, and say what each is."""
    return {path: FileRecord.of(directory / path) for path in paths}


def files_of(directory: Path) -> list[str]:
    """Paths, within a directory, of all its files but its manifest, sorted."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest, and wait until it is on the disk; one that is there is replaced as a whole."""
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1, sort_keys=True)
    partial = directory / (MANIFEST + ".partial")
    with naming(directory / MANIFEST), partial.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest | None:
    """Return a checkpoint's manifest; None where there is none, as in checkpoints of releases up to 0.4.

    Raises:
        CheckpointError: the manifest is damaged, or cannot be read.
    """
    path = directory / MANIFEST
    try:
        tree = json.loads(path.read_text())
        files = {name: FileRecord(int(of["size"]), str(of["sha256"])) for name, of in tree["files"].items()}
        metrics = {str(name): float(value) for name, value in tree["metrics"].items()}
        seconds = tree.get("seconds")
        return Manifest(
            run_id=str(tree["run_id"]),
            step=int(tree["step"]),
            version=str(tree["version"]),
            metrics=metrics,
            files=files,
            seconds=None if seconds is None else float(seconds),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from error


def faults(directory: Path, manifest: Manifest, paths: Collection[str] | None = None) -> Iterator[str]:
    """Iterate over what is wrong with a checkpoint's files, a sentence each; files that are too many do not matter.

    Args:
        directory: the checkpoint.
        manifest: what it must be.
        paths: the files to look at, so that ranks can share them; None for all.
    """
    for path in sorted(manifest.files if paths is None else paths):
        expected, file = manifest.files[path], directory / path
        try:
            size = file.stat().st_size
            if size != expected.size:
                yield f"{file} has {size} bytes, {expected.size} were written"
            elif FileRecord.of(file) != expected:
                yield f"{file} holds other bytes than were written"
        except FileNotFoundError:
            yield f"{file} is missing"
        except OSError as error:
            yield f"{file} cannot be read: {error.strerror}"


def sync_directory(directory: Path) -> None:
    """Wait until all that a directory holds, and its names, are on the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):  # a disk that is full may say so only now
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
