# SPDX-License-Identifier: Apache-2.0
"""Gathers full Hugging Face tensors from the parallel policy, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_g2rpo.collectives import all_gather, gather
from megatron_g2rpo.weights.rules import Replicated
from megatron_g2rpo.weights.table import Entry, WeightTable


@dataclass(frozen=True)
class WeightSource:
    """All weights of a policy; every iteration gathers the tensors anew.

    Attributes:
        specs: function that returns the tensors that an iteration yields, on the meta device and in its order. A
            collective of the replica.
        tensors: function that starts an iteration over ``(hf_name, full_tensor)``; see ``stream``.
    """

    specs: Callable[[], dict[str, Tensor]]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors()


def stream(
    model: nn.Module,
    table: WeightTable,
    *,
    tensor_group: dist.ProcessGroup | None,
    pipeline_group: dist.ProcessGroup | None = None,
    layer_offset: int = 0,
    tensor_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
    dtype_of: Callable[[nn.Parameter], torch.dtype] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Gather full tensors by Hugging Face name over pipeline stages and tensor-parallel ranks, as they are asked for.

    It is a collective: every rank of the replica must exhaust the iterator, and all receive every tensor. Stages
    exchange what they hold once, with the first tensor. A shard goes from its stage to the others before shards are
    joined, so that a tensor crosses a link between stages (often one between nodes) once, not once per tensor-parallel
    rank.

    Args:
        model: this rank's pipeline stage of the model, without wrapper.
        table: the weight table of the model's family.
        tensor_group: tensor-parallel process group; None when every rank holds a whole stage.
        pipeline_group: pipeline-parallel process group, in the order of the stages; None when there is one stage.
        layer_offset: number of layers on earlier stages.
        tensor_of: function that returns what to stream of a parameter, its data or for example its gradient. The result
            has the parameter's shape. The function is called for each parameter, in order, as they are asked for.
        dtype_of: function that returns the dtype of that; with None, ``tensor_of`` is called once more to find out.

    Yields:
        ``(hf_name, full_tensor)`` in the order of the stages and of their parameters; at most one parameter is gathered
        at once. A tensor is valid until the next is asked for and must not be written to.

    Raises:
        UnmappedParameter: the table does not know a parameter (on other stages: RuntimeError).
        ValueError: two parameters hold the same tensor and neither is a copy, as with a wrong ``layer_offset``.
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    dtype_of = dtype_of or (lambda parameter: tensor_of(parameter).dtype)
    stages = _holdings(model, table, pipeline_group, layer_offset, dtype_of)
    this_stage = dist.get_rank(pipeline_group) if pipeline_group is not None else 0
    for stage, holding in _without_copies(stages):
        if stage == this_stage:
            local = tensor_of(parameters[holding.name]).to(device).contiguous()
        else:
            local = torch.empty(holding.shape, dtype=holding.dtype, device=device)
        if len(stages) > 1:
            dist.broadcast(local, group=pipeline_group, group_src=stage)
        shards = [local] if isinstance(holding.entry.rule, Replicated) else _shards(local, tensor_group)
        yield from zip(holding.entry.hf_names, holding.entry.rule.merge(shards), strict=True)


def specs(
    model: nn.Module,
    table: WeightTable,
    *,
    tensor_size: int,
    pipeline_group: dist.ProcessGroup | None = None,
    layer_offset: int = 0,
) -> dict[str, Tensor]:
    """Return what ``stream`` will yield, on the meta device, in its order. A collective of the pipeline group.

    Args:
        model, table, pipeline_group, layer_offset: the arguments of ``stream`` with these names.
        tensor_size: number of ranks of the tensor-parallel group.
    """
    stages = _holdings(model, table, pipeline_group, layer_offset, lambda parameter: parameter.dtype)
    result: dict[str, Tensor] = {}
    for _, holding in _without_copies(stages):
        shard = torch.empty(holding.shape, dtype=holding.dtype, device="meta")
        result.update(zip(holding.entry.hf_names, holding.entry.rule.merge([shard] * tensor_size), strict=True))
    return result


def _holdings(
    model: nn.Module,
    table: WeightTable,
    pipeline_group: dist.ProcessGroup | None,
    layer_offset: int,
    dtype_of: Callable[[nn.Parameter], torch.dtype],
) -> list[list[_Holding]]:
    def make() -> list[_Holding]:
        return [
            _Holding(name, table.entry(name, layer_offset), parameter.shape, dtype_of(parameter))
            for name, parameter in model.named_parameters()
        ]

    return [make()] if pipeline_group is None else gather(make, pipeline_group)


@dataclass(frozen=True)
class _Holding:
    """What a stage tells the other stages about one parameter."""

    name: str
    entry: Entry
    shape: torch.Size
    dtype: torch.dtype


def _without_copies(stages: list[list[_Holding]]) -> Iterator[tuple[int, _Holding]]:
    """Iterate over parameters with their stages; copies of parameters of earlier stages are left out."""
    seen: dict[tuple[str, ...], str] = {}
    for stage, holdings in enumerate(stages):
        for holding in holdings:
            names, where = holding.entry.hf_names, f"{holding.name} of pipeline stage {stage}"
            if names not in seen:
                seen[names] = where
                yield stage, holding
            elif not holding.entry.copy:
                raise ValueError(f"both {seen[names]} and {where} hold {', '.join(names)}")


def _shards(local: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    return [local] if group is None else all_gather(local, group=group)
