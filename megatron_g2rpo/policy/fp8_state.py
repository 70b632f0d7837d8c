# SPDX-License-Identifier: Apache-2.0
"""The state of delayed FP8 scaling in checkpoints: scales and histories of amaxes (largest magnitudes), as tensors.

Transformer Engine keeps it in each linear, and would save it as a pickle (``_extra_state``) that it refuses to load
itself unless told that the file is to be trusted. The other recipes have no state: their scales come from the tensor
that is quantised.

The state is one of a layer, not of a rank: amaxes are reduced over tensor-, context- and data-parallel ranks before a
scale is computed from them, so that a scale means the same at every layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import TE_LINEAR_TYPES, get_fp8_recipe
from torch import Tensor

from megatron_g2rpo.weights.megatron_checkpoint import FP8_STATE

_DELAYED = "delayed"
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")


def sharded_state_dict(model: Any) -> dict[str, ShardedTensor]:
    """Return the scaling state of this stage's layers, by the name that it has in a checkpoint. A collective.

    Args:
        model: this rank's part of the model, without wrapper.

    Returns:
        ``scale`` ``[tensors]`` and ``amax_history`` ``[steps, tensors]`` of each linear and direction, float32; the
        tensors are input, weight and output forward, gradients of output and input backward. Empty where the recipe
        has no state.
    """
    if not _is_delayed(model.config):
        return {}
    state = {name: tensor.clone() for name, tensor in _tensors(model)}
    group = _amax_group(model.config)
    if state and dist.get_world_size(group) > 1:
        # The newest amaxes may not have been reduced yet, and each rank has its own. Their maximum takes part in the
        # next reduction as the ranks' own would have. Scales are one already, but for those of FP8 weights before the
        # first pass with gradient: the smallest, of the largest shard, fits all of them.
        signs = [-1 if name.endswith(".scale") else 1 for name in state]
        flat = torch.cat([sign * tensor.flatten() for sign, tensor in zip(signs, state.values(), strict=True)])
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
        pieces = flat.split([tensor.numel() for tensor in state.values()])
        reduced = zip(state.items(), signs, pieces, strict=True)
        state = {name: sign * piece.view_as(tensor) for (name, tensor), sign, piece in reduced}
    replica = (0, dist.get_rank(group))
    return {
        name: ShardedTensor.from_rank_offsets(key=name, data=tensor, replica_id=replica)
        for name, tensor in state.items()
    }


def load_state_dict(model: Any, state: Mapping[str, Tensor]) -> None:
    """Restore the scaling state in place.

    Args:
        model: this rank's part of the model, without wrapper.
        state: what was loaded for ``sharded_state_dict``; empty to leave the state as it is.
    """
    if state:
        for name, tensor in _tensors(model):
            tensor.copy_(state[name])


def keep_stored(template: dict[str, ShardedTensor], sizes: Mapping[str, torch.Size], directory: str | Path) -> None:
    """Remove everything from a template where a checkpoint does not have it: scaling then starts anew, with a warning.

    It does where the run that wrote the checkpoint had other arithmetic, an FP8 format or a length of the history.

    Args:
        template: result of ``sharded_state_dict``; it is changed.
        sizes: sizes of all tensors in the checkpoint.
        directory: the checkpoint's directory, for the warning.
    """
    lacking = [name for name, entry in template.items() if sizes.get(name) != torch.Size(entry.global_shape)]
    if not lacking:
        return
    warnings.warn(
        f"{directory} does not have the FP8 scales and amax histories that this run would go on with (for example "
        f"{lacking[0]}): delayed scaling starts anew, from scales of 1",
        stacklevel=2,
    )
    template.clear()


def _is_delayed(config: Any) -> bool:
    return bool(config.fp8) and config.fp8_recipe == _DELAYED


def _amax_group(config: Any) -> Any:
    """Return the ranks over which amaxes are reduced; megatron-core gives Transformer Engine the same."""
    return parallel_state.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the live tensors of this stage with their names, in which layers have their global numbers.

    The format is part of a name: a scale is the largest number of its format over an amax, and would overflow another.
    """
    recipe = get_fp8_recipe(config=model.config)
    for layer in model.language_model.decoder.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, TE_LINEAR_TYPES):
                continue
            linear: Any = module
            if not linear.fp8_meta_tensors_initialized:  # by the first forward pass, otherwise
                linear.fp8_meta["num_gemms"] = 1
                linear.init_fp8_meta_tensors(recipe)
            for direction in _DIRECTIONS:
                for tensor in _TENSORS:
                    parts = (model.config.fp8, f"layers.{layer.layer_number - 1}", name, direction, tensor)
                    yield FP8_STATE + ".".join(parts), getattr(linear.fp8_meta[direction], tensor)
