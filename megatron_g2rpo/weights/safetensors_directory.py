# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"


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

    Args:
        directory: the directory that holds ``model.safetensors`` or its shards.

    Raises:
        CheckpointError: the directory holds no safetensors file.
    """

    def __init__(self, directory: str | Path) -> None:
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file; a Hugging Face model directory is expected")
        self._where: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._where.update(dict.fromkeys(file.keys(), path))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the directory's tensors."""
        return {self[name].dtype for name in self}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
