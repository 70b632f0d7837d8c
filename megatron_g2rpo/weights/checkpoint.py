# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A Hugging Face checkpoint that does not fit the model."""


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a Hugging Face directory, mapped from its files: a slice of one reads only its own pages.

    Args:
        directory: holds ``model.safetensors`` or its shards.

    Raises:
        CheckpointError: there are no safetensors in it.
    """

    def __init__(self, directory: str | Path) -> None:
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file; a Hugging Face model directory is expected")
        self._files = [safe_open(file, framework="pt") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (a safetensors file is no mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
