# SPDX-License-Identifier: Apache-2.0
"""Reads what a megatron-core checkpoint says of itself, without running what it says.

``.metadata``, the list of a ``torch.distributed.checkpoint``'s tensors, is a pickle, and a pickle names functions to
call. torch and megatron-core call whatever it names. Here only the classes are known that such a list consists of.
"""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_g2rpo.weights.safetensors_directory import CheckpointError

METADATA, TENSORS, COMMON = "metadata.json", ".metadata", "common.pt"
_BACKEND = "torch_dist"
_DCP = "torch.distributed.checkpoint."
# What a list of tensors holds, by module: data classes and enumerations, sizes, paths, and torch's layout by its name.
_CLASSES = {
    _DCP + "metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    _DCP + "planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    _DCP + "filesystem": ("_StorageInfo",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}


def reason(error: BaseException) -> str:
    """Return why a file of a checkpoint could not be read: the error's kind and its text.

    Of torch's error about a pickle that holds more than tensors only the finding is kept: the rest of its text advises
    to read the file with ``weights_only=False``, which would run what is in it.
    """
    text = str(error)
    finding = text.partition("WeightsUnpickler error:")[2].strip()
    text = finding.partition("\n")[0] or text
    return f"{type(error).__name__}: {text}".rstrip(": ")  # not every error has a text


class _KnownClasses(pickle.Unpickler):
    """An unpickler that finds the classes of ``_CLASSES`` and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(f"it names {module}.{name}, which no list of tensors holds and which is not run")


def read_metadata(directory: Path) -> Metadata:
    """Return the list of a checkpoint's tensors.

    Raises:
        CheckpointError: the directory is no megatron-core checkpoint, or one of another format; a file is missing or
            damaged, or names something to run. Names the file.
    """
    path = directory / METADATA
    if not path.is_file():
        raise CheckpointError(f"{directory} is no Megatron checkpoint: it has no {METADATA}")
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); use another checkpoint") from error
    if backend != _BACKEND:
        raise CheckpointError(f"{directory}: its format is {backend!r}; {_BACKEND!r} is the one that is read")
    path = directory / TENSORS
    try:
        with path.open("rb") as file:
            metadata = _KnownClasses(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist, so the checkpoint is not whole; use another one") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not to be trusted: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); use another checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is damaged: it holds a {type(metadata).__name__}; use another checkpoint")
    return metadata


def structural_faults(directory: Path) -> Iterator[str]:
    """Iterate over what can be seen to be wrong with a checkpoint that has no manifest, a sentence each.

    Files that are missing or too short are found; bytes that are others than were written are not, but for those of
    ``common.pt``, an archive with checksums. What that names is not looked at: that is for who loads it to refuse.
    """
    try:
        metadata = read_metadata(directory)
    except CheckpointError as error:
        yield str(error)
        return
    needed = {COMMON: 1}
    for place in (metadata.storage_data or {}).values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, least in sorted(needed.items()):
        file = directory / name
        if not file.is_file():
            yield f"{file} is missing"
        elif (size := file.stat().st_size) < least:
            yield f"{file} has {size} bytes, at least {least} were written"
        elif name == COMMON and (why := _fault_of_archive(file)):
            yield f"{file} is damaged: {why}"


def _fault_of_archive(file: Path) -> str:
    """What is wrong with a file of ``torch.save``; empty if nothing is. Nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        return reason(error)
    return f"{broken} in it holds other bytes than were written" if broken else ""
