# SPDX-License-Identifier: Apache-2.0
"""Full Hugging Face tensors into the parallel policy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_g2rpo.weights.checkpoint import CheckpointError
from megatron_g2rpo.weights.stages import of_all_stages
from megatron_g2rpo.weights.table import Entry, WeightTable


def load(
    model: nn.Module,
    table: WeightTable,
    tensors: Mapping[str, Tensor],
    *,
    tensor_rank: int,
    tensor_size: int,
    source: str,
    pipeline_group: dist.ProcessGroup | None = None,
    layer_offset: int = 0,
) -> None:
    """Copy full Hugging Face tensors into this rank's shards. A collective of the pipeline group.

    Args:
        model: the unwrapped model of this rank: its pipeline stage.
        table: its weight table.
        tensors: full tensors by name; may be lazy (``SafetensorsDirectory``), each is sliced before it is copied.
        tensor_rank, tensor_size: position in the tensor-parallel group.
        source: where the tensors come from, for messages.
        pipeline_group: pipeline-parallel process group, in the order of the stages; None when there is one stage.
        layer_offset: layers on earlier stages.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is left over on all stages; raised on every stage.
        UnmappedParameter: the table does not know a parameter (on other stages: RuntimeError).
    """

    def take() -> set[str]:
        used: set[str] = set()
        for name, parameter in model.named_parameters():
            entry = table.entry(name, layer_offset)
            full = _full(tensors, name, entry, parameter.shape, tensor_size, source)
            parameter.data.copy_(entry.rule.shard(full, tensor_rank, tensor_size))
            used.update(entry.hf_names)
        return used

    used = set[str]().union(*of_all_stages(take, pipeline_group))
    left = sorted(set(tensors) - used - table.ignored)
    if left:
        raise CheckpointError(f"{source}: {len(left)} tensors fit no parameter, the first: {', '.join(left[:3])}")


def _full(
    tensors: Mapping[str, Tensor], name: str, entry: Entry, shape: torch.Size, tensor_size: int, source: str
) -> list[Tensor]:
    """The tensors of one parameter, if they have the shapes that shards of this shape make."""
    missing = [hf_name for hf_name in entry.hf_names if hf_name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: lacks {', '.join(missing)}, needed for {name}")
    full = [tensors[hf_name] for hf_name in entry.hf_names]
    expected = entry.rule.merge([torch.empty(shape, device="meta")] * tensor_size)
    for hf_name, tensor, like in zip(entry.hf_names, full, expected, strict=True):
        if tensor.shape != like.shape:
            raise CheckpointError(
                f"{source}: {hf_name} has shape {tuple(tensor.shape)}, but the model's {name} needs "
                f"{tuple(like.shape)}; does config.json belong to these weights?"
            )
    return full
