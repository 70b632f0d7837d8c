# SPDX-License-Identifier: Apache-2.0
"""Loads full Hugging Face tensors into the parallel policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_g2rpo.collectives import gather
from megatron_g2rpo.weights.safetensors_directory import CheckpointError, SafetensorsDirectory
from megatron_g2rpo.weights.soundness import flaw, refuse_flaws
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
    on_loaded: Callable[[int], None] | None = None,
    assign: Callable[[nn.Parameter, Tensor], object] = lambda parameter, value: parameter.data.copy_(value),
) -> None:
    """Copy full Hugging Face tensors into this rank's shards. A collective of the pipeline group.

    Args:
        model: this rank's pipeline stage of the model, without wrapper.
        table: the weight table of the model's family.
        tensors: full tensors by Hugging Face name; they may be lazy (``SafetensorsDirectory``), because each is sliced
            before it is copied.
        tensor_rank, tensor_size: this rank's position in the tensor-parallel group, and the group's size.
        source: where the tensors come from, for error messages.
        pipeline_group: pipeline-parallel process group, in the order of the stages; None when there is one stage.
        layer_offset: number of layers on earlier stages.
        on_loaded: callback(num_bytes), called after each parameter that was copied.
        assign: function that copies a value into a parameter.

    Raises:
        CheckpointError: tensors are missing, have other shapes, or fit no parameter on any stage: all are listed.
            Raised on every stage, before anything is copied.
            Tensors that are not finite in the parameter's dtype are listed after all was copied, on the ranks whose
            shards have some of it.
        UnmappedParameter: the table does not know a parameter of some stage. Raised on every stage.
    """
    entries = {}

    def check() -> tuple[set[str], dict[str, str]]:
        problems: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            entries[name] = table.entry(name, layer_offset)
            problems |= _problems(tensors, name, entries[name], parameter.shape, tensor_size)
        return {hf_name for entry in entries.values() for hf_name in entry.hf_names}, problems

    stages = [check()] if pipeline_group is None else gather(check, pipeline_group)
    used = set[str]().union(*(names for names, _ in stages))
    # By name: two stages may hold copies of one tensor.
    problems = list({name: problem for _, of_stage in stages for name, problem in of_stage.items()}.values())
    problems += [f"fits no parameter: {name}" for name in sorted(set(tensors) - used - table.ignored)]
    if problems:
        raise CheckpointError.misfit(source, problems)
    flaws: list[str] = []
    for name, parameter in model.named_parameters():
        full = [tensors[hf_name] for hf_name in entries[name].hf_names]
        shard = entries[name].rule.shard(full, tensor_rank, tensor_size)
        if flaw(shard, parameter.dtype):
            flaws += _flaws(tensors, dict(zip(entries[name].hf_names, full, strict=True)), parameter.dtype)
        assign(parameter, shard)
        if on_loaded is not None:
            on_loaded(parameter.nbytes)
    refuse_flaws(flaws, source)


def _flaws(source: Mapping[str, Tensor], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[str]:
    """Iterate over what is wrong with the values of some of ``source``'s tensors, with the file where there is one."""
    for name, tensor in tensors.items():
        if what := flaw(tensor, dtype):
            where = f" in {source.file_of(name)}" if isinstance(source, SafetensorsDirectory) else ""
            yield f"{name}{where} {what}"


def _problems(
    tensors: Mapping[str, Tensor], name: str, entry: Entry, shape: torch.Size, tensor_size: int
) -> dict[str, str]:
    """Return what is wrong with the tensors of one parameter whose shards have ``shape``, by Hugging Face name."""
    expected = entry.rule.merge([torch.empty(shape, device="meta")] * tensor_size)
    problems = {}
    for hf_name, like in zip(entry.hf_names, expected, strict=True):
        if hf_name not in tensors:
            problems[hf_name] = f"missing: {hf_name} (for {name})"
        elif (found := tensors[hf_name].shape) != like.shape:
            problems[hf_name] = f"shape {tuple(found)} instead of {tuple(like.shape)}: {hf_name} (for {name})"
    return problems
