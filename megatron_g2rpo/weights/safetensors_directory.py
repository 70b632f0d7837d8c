# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a Hugging Face model directory: which of its files are the model, and whether they are whole.

Directories as people have them hold more than one model's files: shards that an earlier save left behind, another
format's copy (``consolidated.safetensors``), an adapter. Here alone is decided which of them count.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Safetensors' names of the dtypes that weights may have.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Never the model's own weights: Mistral's and Meta's copy in another format, and a low-rank adapter (PEFT).
_OTHERS = ("consolidated*.safetensors", "adapter_model*.safetensors")
# Rotary frequencies, which old checkpoints hold and models compute; transformers ignores them too.
_COMPUTED = ("rotary_emb.inv_freq",)
_LFS = b"version https://git-lfs"
_SHOWN = 5  # names in a message

_logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model."""

    @classmethod
    def misfit(cls, source: object, problems: Collection[str]) -> CheckpointError:
        """Return the error that lists all problems by which the weights of ``source`` do not fit its config.json."""
        lines = "\n  ".join(problems)
        return cls(f"{source}: the weights do not fit config.json in {len(problems)} places:\n  {lines}")


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a Hugging Face directory, mapped from its files: a slice of one reads only its own pages.

    Each access maps the tensor anew, so that its pages leave this process's memory when the tensor is freed.

    Where there is ``model.safetensors.index.json``, it decides: files and tensors that it does not name are ignored,
    but for ``model.safetensors``: which of the two is the model, readers do not agree on.
    Without it ``model.safetensors`` is the model; without that, all other files together are, if no tensor is in two of
    them. What is ignored is logged as a warning, once for each directory.

    Attributes:
        files: the files that hold the tensors.
        ignored: the ``*.safetensors`` files beside them, and the tensors of ``files`` that the index does not name.

    Args:
        directory: the directory that holds ``model.safetensors`` or its shards.

    Raises:
        CheckpointError: the directory holds no weights in safetensors files; its index is broken, or names a file or
            tensor that is not there, or not ``model.safetensors``, which is; a file is damaged, or a pointer of
            git-lfs; a tensor is in two files of which none is named by an index, or is not of floating point (quantised
            weights).
    """

    _warned: set[Path] = set()  # noqa: RUF012 (one for all instances)

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        present = sorted(directory.glob("*.safetensors"))
        named = _index(directory)
        self.files = _chosen(directory, present) if named is None else sorted({directory / f for f in named.values()})
        self.ignored = [path.name for path in present if path not in self.files]
        self._where: dict[str, Path] = {}
        dtypes: dict[str, str] = {}
        for path in self.files:
            for name, dtype in _header(path).items():
                if name.endswith(_COMPUTED):
                    continue
                if named is not None and named.get(name) != path.name:
                    self.ignored.append(f"{name} in {path.name}")
                    continue
                if name in self._where:
                    raise CheckpointError(
                        f"{directory}: {name} is in {self._where[name].name} and in {path.name}, and no {INDEX_NAME} "
                        "says which counts; move the files that are not the model's elsewhere"
                    )
                self._where[name], dtypes[name] = path, dtype
        if named is not None:
            _check_complete(directory, named, self._where)
        _check_floating(directory, dtypes)
        self.dtypes: set[torch.dtype] = {FLOATING[dtype] for dtype in dtypes.values()}
        self._warn(directory)

    def _warn(self, directory: Path) -> None:
        first = int(os.environ.get("RANK", "0")) == 0  # one rank's word is enough
        if not self.ignored or not first or directory.resolve() in self._warned:
            return
        self._warned.add(directory.resolve())
        why = f"{INDEX_NAME} does not name them" if (directory / INDEX_NAME).exists() else "they are not the model's"
        _logger.warning("%s: ignored, because %s: %s", directory, why, _listed(self.ignored))

    @property
    def nbytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._where[name]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _index(directory: Path) -> dict[str, str] | None:
    """Return the name of the file of every tensor by the directory's index; None where there is no index.

    Rotary frequencies, which no model needs, are left out.
    """
    path = directory / INDEX_NAME
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from error
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        hint = "it is a pointer of git-lfs: run `git lfs pull`" if text.startswith(_LFS.decode()) else "copy it again"
        raise CheckpointError(f"{path} is not JSON ({error}); {hint}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files; copy it again")
    files = set(weight_map.values())
    if elsewhere := sorted(name for name in files if Path(name).name != name):
        raise CheckpointError(f"{path} names files outside of its directory: {_listed(elsewhere)}")
    if absent := sorted(name for name in files if not (directory / name).is_file()):
        raise CheckpointError(
            f"{path} names files that are not there: {_listed(absent)}; copy them, or remove the index if it belongs "
            "to another model"
        )
    if SINGLE_NAME not in files and (directory / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{directory} holds two models: {SINGLE_NAME}, which transformers would read, and what {INDEX_NAME} names, "
            "which vLLM would; move one of them elsewhere"
        )
    return {name: file for name, file in weight_map.items() if not name.endswith(_COMPUTED)}


def _chosen(directory: Path, present: list[Path]) -> list[Path]:
    """Return the files that are the model's where no index says so."""
    if directory / SINGLE_NAME in present:
        return [directory / SINGLE_NAME]
    others = [path for path in present if any(path.match(pattern) for pattern in _OTHERS)]
    chosen = [path for path in present if path not in others]
    if chosen:
        return chosen
    if others:
        what = "an adapter: merge it into its model first" if others[0].name.startswith("adapter") else "another format"
        raise CheckpointError(f"{directory}: of weights there is only {_listed([p.name for p in others])} ({what})")
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    hint = (
        f"; {_listed(pickled)} can be read by transformers, whose save_pretrained then writes safetensors"
        if pickled
        else ""
    )
    raise CheckpointError(f"{directory}: no *.safetensors file; a Hugging Face model directory is expected{hint}")


def _header(path: Path) -> dict[str, str]:
    """Return the tensors of a file with safetensors' names of their dtypes."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:  # a link to nothing, a directory, no permission
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
        if pointer:
            raise CheckpointError(f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull`") from error
        raise CheckpointError(
            f"{path} is damaged or was not copied whole ({path.stat().st_size} bytes; {error}); copy it again"
        ) from error


def _check_complete(directory: Path, named: Mapping[str, str], found: Mapping[str, Path]) -> None:
    if missing := [f"{name} in {file}" for name, file in named.items() if name not in found]:
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {len(missing)} tensors that are not there: {_listed(missing)}; index and "
            "files are of different saves"
        )


def _check_floating(directory: Path, dtypes: Mapping[str, str]) -> None:
    if other := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in FLOATING]:
        raise CheckpointError(
            f"{directory}: {len(other)} tensors are not of {', '.join(FLOATING)}: {_listed(other)}; quantised weights "
            "cannot be trained: use the model as it was before quantisation"
        )


def _listed(names: Collection[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
