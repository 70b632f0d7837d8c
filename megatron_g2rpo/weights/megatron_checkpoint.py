# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of a megatron-core checkpoint, whole and one at a time, without a model or process groups."""

from __future__ import annotations

import math
import pickle
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_g2rpo.weights.checkpoint_metadata import read_metadata, reason
from megatron_g2rpo.weights.rules import Vocabulary, padded_rows
from megatron_g2rpo.weights.safetensors_directory import CheckpointError
from megatron_g2rpo.weights.table import Entry, UnmappedParameter, WeightTable

# Folder of a checkpoint that holds the model's config, tokenizer and processor.
MODEL_FILES = "huggingface"
# How the names of the state of FP8 scaling start.
FP8_STATE = "fp8."
_NO_WEIGHTS = ("optimizer.", FP8_STATE)
_STACKED = re.compile(r"(.*\bdecoder\.layers\.)(?!\d)(.*)")


class MegatronCheckpoint(Mapping[str, Tensor]):
    """The full tensors of a checkpoint by Megatron name, each read when it is asked for.

    Names and tensors are those of a model on a single rank. megatron-core's ``dist_checkpointing`` writes the format of
    ``torch.distributed.checkpoint``: tensors are global, in pieces as the ranks held them, and a parameter of a
    decoder's layers is one tensor, its first axis the layers, unless the layers differ. Here it is one tensor per
    layer. Optimizer state, scales of FP8 and entries that are not
    tensors are left out.

    Attributes:
        directory: the checkpoint's directory.

    Raises:
        CheckpointError: the directory is no megatron-core checkpoint that can be read; see ``read_metadata``.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        metadata = read_metadata(self.directory)  # not the reader's own, which runs what the file says
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NO_WEIGHTS)
        }
        self._places = dict(self._places_of_parameters())

    def _places_of_parameters(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Iterate over Megatron names, each with the stored tensor and the layer of it that hold the parameter."""
        for key, entry in self._stored.items():
            stacked = _STACKED.fullmatch(key)
            if stacked is None:
                yield key, (key, None)
                continue
            for layer in range(entry.size[0]):
                yield f"{stacked[1]}{layer}.{stacked[2]}", (key, layer)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the checkpoint's weights."""
        return {entry.properties.dtype for entry in self._stored.values()}

    def spec(self, name: str) -> Tensor:
        """Return a tensor on the meta device that has the parameter's shape and dtype."""
        key, layer = self._places[name]
        entry = self._stored[key]
        return torch.empty(entry.size if layer is None else entry.size[1:], dtype=entry.properties.dtype, device="meta")

    def row_pieces(self, name: str) -> int:
        """Return over how many ranks the rows of a parameter, which is stored as one tensor, were split."""
        return len({chunk.offsets[0] for chunk in self._stored[self._places[name][0]].chunks})

    def __getitem__(self, name: str) -> Tensor:
        key, layer = self._places[name]
        entry = self._stored[key]
        first, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            first[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(first), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.directory}: it does not have all of {name}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:  # a truncated file
            raise CheckpointError(
                f"{self.directory}: {name} cannot be read, a file of it is damaged ({reason(error)})"
            ) from error
        return target if layer is None else target[0]

    def read_ahead(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Iterate over parameters in the order of ``names``.

        While one is in use, the next are read; together they take no more memory than the largest parameter.
        """
        sizes = {name: self.spec(name).nbytes for name in names}
        largest = max(sizes.values(), default=0)
        ahead: deque[tuple[str, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as reader:
            for name in sizes:
                ahead.append((name, reader.submit(self.__getitem__, name)))
                while sum(sizes[waiting] for waiting, _ in ahead) > largest:
                    yield _taken(ahead)
            while ahead:
                yield _taken(ahead)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _taken(ahead: deque[tuple[str, Future[Tensor]]]) -> tuple[str, Tensor]:
    name, future = ahead.popleft()
    return name, future.result()


class _Into(DefaultLoadPlanner):
    """A load plan that reads the pieces of one stored tensor into a given tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        where = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(first, first + length) for first, length in where)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was read into its place


def hf_contents(
    checkpoint: MegatronCheckpoint, table: WeightTable, published: Mapping[str, Tensor]
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """Check that a checkpoint holds exactly the model's tensors, and return them by Hugging Face name.

    Args:
        checkpoint: the checkpoint, with the local layer spec's names of norms or Transformer Engine's.
        table: the weight table of the model's family.
        published: the model's tensors by Hugging Face name; see ``published_tensors``.

    Returns:
        The table's entry of every Megatron name; every Hugging Face tensor on the meta device, with the dtype that it
        has in the checkpoint. Both are in the order of ``published``.

    Raises:
        CheckpointError: tensors are missing, have other shapes, or do not belong to the model; all are listed.
    """
    entries: dict[str, Entry] = {}
    found: dict[str, Tensor] = {}
    problems = []
    for name in checkpoint:
        spec = checkpoint.spec(name)
        try:
            entry = table.entry(name)
            tensors = dict(zip(entry.hf_names, entry.rule.merge([spec]), strict=True))
        except UnmappedParameter:
            problems.append(f"fits no tensor: {name}")
            continue
        except RuntimeError:  # torch's, of a shape that cannot be taken apart
            problems.append(f"shape {tuple(spec.shape)}: {name}")
            continue
        if isinstance(entry.rule, Vocabulary):
            rows = padded_rows(entry.rule.size, checkpoint.row_pieces(name))
            if len(spec) > rows:  # what is beyond the padding would be lost
                problems.append(f"{len(spec)} rows instead of {rows}, padding included: {name}")
        problems += [f"is there twice: {hf_name} (in {name})" for hf_name in tensors.keys() & found.keys()]
        entries[name] = entry
        found |= tensors
    for hf_name, like in published.items():
        if hf_name not in found:
            problems.append(f"missing: {hf_name}")
        elif found[hf_name].shape != like.shape:
            problems.append(f"shape {tuple(found[hf_name].shape)} instead of {tuple(like.shape)}: {hf_name}")
    problems += [f"fits no tensor: {hf_name}" for hf_name in found.keys() - published.keys()]
    if problems:
        raise CheckpointError.misfit(checkpoint.directory, sorted(problems))
    order = {hf_name: number for number, hf_name in enumerate(published)}
    ordered = sorted(entries.items(), key=lambda item: order[item[1].hf_names[0]])
    return dict(ordered), {hf_name: found[hf_name] for hf_name in published}
