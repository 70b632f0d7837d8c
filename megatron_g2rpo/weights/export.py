# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face model directory from a weight stream, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from megatron_g2rpo import progress
from megatron_g2rpo.weights.files import naming
from megatron_g2rpo.weights.model_files import ProcessorSettings, copy_model_files
from megatron_g2rpo.weights.ownership import Owner
from megatron_g2rpo.weights.safetensors_directory import FLOATING, INDEX_NAME

_NAMES = "model{suffix}.safetensors"
_DTYPES = {dtype: name for name, dtype in FLOATING.items()}


def export_hf(
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, Tensor],
    directory: str | Path,
    *,
    source: str | Path,
    write: bool,
    max_shard_size: int | str = "5GB",
    settings: ProcessorSettings | None = None,
    run_id: str = "",
) -> None:
    """Write a Hugging Face directory that ``from_pretrained`` loads.

    It is a collective like the stream that it reads: every rank calls it, and ranks with ``write=False`` only drain the
    stream. The directory appears whole or not at all: it is written beside its place and renamed. Its config.json names
    the dtype of the weights, which ``from_pretrained`` would otherwise round to the source's.

    Args:
        tensors: stream of ``(hf_name, full_tensor)``; each tensor is written before the next is asked for.
        specs: every tensor that the stream will yield, by name, on the meta device.
        directory: the directory to write.
        source: the model directory that training started from; its other files are copied.
        write: whether this rank writes.
        max_shard_size: largest size of one safetensors file, a number of bytes or a string such as ``"5GB"``; a larger
            tensor has a file of its own.
        settings: what the copied files must say of the run's processor; None to leave them as they are.
        run_id: the run whose earlier export is replaced; empty to replace nothing.

    Raises:
        NotOursError: before anything is written: something else is in the way; see ``Owner.check``.
        ValueError: a tensor is not in ``specs``, came twice, has another shape or dtype, or did not come.
        OSError: a file cannot be written, as of a full disk; names it. What was begun is removed.
    """
    if not write:
        for _ in tensors:
            progress.advance()
        return
    with (
        hf_directory(directory, specs, source=source, settings=settings, run_id=run_id) as partial,
        ShardedWriter(partial, specs, max_shard_size=max_shard_size) as writer,
    ):
        for name, tensor in tensors:
            writer.write(name, tensor)
            progress.advance()  # a disk that takes hours does not hang


@contextmanager
def hf_directory(
    directory: str | Path,
    specs: Mapping[str, Tensor],
    *,
    source: str | Path,
    settings: ProcessorSettings | None = None,
    run_id: str = "",
) -> Iterator[Path]:
    """Open a directory to write weights into; on leaving the context it gets its other files and its final name.

    The path that the context yields is ``partial_path(directory)``. The directory is removed if the body raises.

    Args:
        directory: the final directory.
        specs: every tensor that will be written, by name, on the meta device.
        source: the model directory whose other files are copied.
        settings: what these files must say of the run's processor; None to leave them as they are.
        run_id: the run whose earlier export is replaced; empty to replace nothing.

    Raises:
        NotOursError: before anything is written: something else is in the way; see ``Owner.check``.
    """
    directory, owner = Path(directory), Owner(run_id)
    partial = owner.begin(directory)
    try:
        yield partial
        copy_model_files(source, partial, settings)
        dtypes = {spec.dtype for spec in specs.values()}
        if len(dtypes) == 1:
            _name_dtype(partial / "config.json", str(dtypes.pop()).removeprefix("torch."))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    owner.publish(directory)


class ShardedWriter:
    """Writes safetensors files into one directory, tensor by tensor, and an index if there are several files.

    Args:
        directory: the directory of the files.
        specs: every tensor of the directory, by name, on the meta device.
        max_shard_size: largest size of one file, a number of bytes or a string such as ``"5GB"``; a larger tensor has a
            file of its own.
        rank, size: number of this process and number of processes that divide the files among them; process 0 writes
            the index.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, Tensor], *, max_shard_size: int | str, rank: int = 0, size: int = 1
    ) -> None:
        self._directory, self._specs, self._rank = directory, specs, rank
        # New tensors without views: the size of a view's whole storage would count.
        own = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        self._split = split_torch_state_dict_into_shards(own, max_shard_size=max_shard_size, filename_pattern=_NAMES)
        self._mine = list(self._split.filename_to_tensors)[rank::size]
        self._stack = ExitStack()
        self._files: dict[str, SafetensorsWriter] = {}

    @property
    def expects(self) -> set[str]:
        """Names of the tensors that this process writes."""
        return {name for file in self._mine for name in self._split.filename_to_tensors[file]}

    def __enter__(self) -> ShardedWriter:
        for file in self._mine:
            specs = {name: self._specs[name] for name in self._split.filename_to_tensors[file]}
            self._files[file] = self._stack.enter_context(SafetensorsWriter(self._directory / file, specs))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of this process's tensors.

        Raises:
            ValueError: the tensor is not in ``specs``, was written before, or has another shape or dtype.
        """
        if name not in self._split.tensor_to_filename:
            raise ValueError(f"{self._directory}: the stream has a tensor that was not announced: {name}")
        self._files[self._split.tensor_to_filename[name]].write(name, tensor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None and self._split.is_sharded and self._rank == 0:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            with naming(self._directory / INDEX_NAME):
                (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor, in any order.

    The safetensors library can only write a file whose tensors are all in memory. The format is a length (8 bytes,
    little-endian), a header of JSON, and the tensors' bytes.

    Args:
        path: path of the file.
        specs: every tensor of the file, by name, on the meta device.

    Raises:
        ValueError: a tensor's dtype is none of float32, bfloat16, float16, float64.
    """

    def __init__(self, path: Path, specs: Mapping[str, Tensor]) -> None:
        self._path, self._specs, self._missing = path, specs, set(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, spec in specs.items():
            if spec.dtype not in _DTYPES:
                raise ValueError(f"{path}: {name} has dtype {spec.dtype}; weights are {', '.join(map(str, _DTYPES))}")
            start, end = end, end + spec.nbytes
            self._offsets[name] = start
            header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors, as the library does
        self._first = 8 + len(text)
        with naming(path):
            self._file: IO[bytes] = path.open("wb")
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._first + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors.

        Raises:
            ValueError: the tensor was written before, or has another shape or dtype than its spec.
            OSError: it cannot be written, as of a full disk; names the file.
        """
        spec = self._specs[name]
        if name not in self._missing:
            raise ValueError(f"{self._path}: {name} came twice")
        if (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{self._path}: {name} is {tensor.dtype} {list(tensor.shape)}, announced were {spec.dtype} "
                f"{list(spec.shape)}"
            )
        self._missing.remove(name)
        with naming(self._path):
            self._file.seek(self._first + self._offsets[name])
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with naming(self._path):  # what is still in its buffer
            self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self._path}: {len(self._missing)} tensors did not come: {sorted(self._missing)}")


def _name_dtype(config: Path, dtype: str) -> None:
    """Set the dtype in a config.json and its sections, where they state one."""
    tree = json.loads(config.read_text())
    sections = [tree, *(value for value in tree.values() if isinstance(value, dict))]
    stated = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    if any(section[key] != dtype for section, key in stated):
        for section, key in stated:
            section[key] = dtype
        with naming(config):
            config.write_text(json.dumps(tree, indent=2) + "\n")
