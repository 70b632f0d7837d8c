# SPDX-License-Identifier: Apache-2.0
"""Weights between the parallel policy and the world of full Hugging Face tensors, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megatron_g2rpo.weights.rules import Replicated
from megatron_g2rpo.weights.table import WeightTable

INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A Hugging Face checkpoint that does not fit the model."""


def stream(
    model: nn.Module,
    table: WeightTable,
    *,
    tensor_group: dist.ProcessGroup | None,
    tensor_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors by Hugging Face name, gathered over tensor-parallel ranks as they are asked for.

    A collective: every rank of the group must exhaust the iterator, and all receive every tensor.

    Args:
        model: the unwrapped model of this rank.
        table: its weight table.
        tensor_group: tensor-parallel process group; None when the model is whole.
        tensor_of: what to stream of a parameter: its data, or for example its gradient.

    Yields:
        ``(hf_name, full_tensor)`` in the order of the model's parameters; at most one parameter is gathered at once.
        A tensor is valid until the next is asked for and must not be written to.
    """
    size = dist.get_world_size(tensor_group) if tensor_group is not None else 1
    for name, parameter in model.named_parameters():
        entry = table.entry(name)
        local = tensor_of(parameter)
        if size > 1 and not isinstance(entry.rule, Replicated):
            shards = [torch.empty_like(local) for _ in range(size)]
            dist.all_gather(shards, local.contiguous(), group=tensor_group)
        else:
            shards = [local]
        yield from zip(entry.hf_names, entry.rule.merge(shards), strict=True)


def load(
    model: nn.Module,
    table: WeightTable,
    tensors: Mapping[str, Tensor],
    *,
    tensor_rank: int,
    tensor_size: int,
    source: str,
) -> None:
    """Copy full Hugging Face tensors into this rank's shards.

    Args:
        model: the unwrapped model of this rank.
        table: its weight table.
        tensors: full tensors by name; may be lazy (``SafetensorsDirectory``), each is read once.
        tensor_rank, tensor_size: position in the tensor-parallel group.
        source: where the tensors come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is left over.
    """
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        entry = table.entry(name)
        missing = [hf_name for hf_name in entry.hf_names if hf_name not in tensors]
        if missing:
            raise CheckpointError(f"{source}: lacks {', '.join(missing)}, needed for {name}")
        local = entry.rule.shard([tensors[hf_name] for hf_name in entry.hf_names], tensor_rank, tensor_size)
        if local.shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {', '.join(entry.hf_names)} give a shard of shape {tuple(local.shape)}, but the model's "
                f"{name} has {tuple(parameter.shape)}; does config.json belong to these weights?"
            )
        parameter.data.copy_(local)
        used.update(entry.hf_names)
    left = sorted(set(tensors) - used - table.ignored)
    if left:
        raise CheckpointError(f"{source}: {len(left)} tensors fit no parameter, the first: {', '.join(left[:3])}")


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a Hugging Face directory, read when asked for.

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
