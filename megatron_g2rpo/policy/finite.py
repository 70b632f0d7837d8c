# SPDX-License-Identifier: Apache-2.0
"""Finds what of a policy's state is NaN or infinite, before it is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def non_finite(state: Mapping[str, Any]) -> list[str]:
    """Return the names of this rank's tensors that hold NaN or an infinity, each once, in the state's order.

    It reads every tensor once and makes no copy.

    Args:
        state: part of a sharded state dict, such as weights or the optimizer's state; what is not a tensor is left out.
    """
    # Asked for at the end: where tensors are a GPU's, every answer waits for it.
    extremes = [(entry, _extremes(tensor)) for entry, tensor in _tensors(state)]
    return list(dict.fromkeys(_name(entry) for entry, bounds in extremes if not bool(bounds.isfinite().all())))


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    for entry in nested_values(x=state):  # type: ignore[arg-type]
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        tensor = entry.data
        if isinstance(tensor, Tensor) and tensor.numel() > 0 and tensor.dtype in _FLOATS:
            yield entry, tensor.detach()


def _extremes(tensor: Tensor) -> Tensor:
    """Least and largest element, which are NaN where any is."""
    return torch.stack(torch.aminmax(tensor))


def _name(entry: Any) -> str:
    """A tensor's name, with the number of its layer where a checkpoint holds all layers as one tensor."""
    if isinstance(entry, ShardedTensorFactory):
        # Gate and up projection are saved as two tensors of one name.
        entry = next(iter(nested_values(x=entry.build())))
    if entry.prepend_axis_num:
        return entry.key.replace(".layers.", f".layers.{entry.global_offset[0]}.", 1)
    return entry.key
