# SPDX-License-Identifier: Apache-2.0
"""The policy's state in megatron-core's distributed checkpoints: one format for every layout, layers and optimizer.

Weights and their optimizer state have the names that Transformer Engine's modules give them, whatever the layers are
made of; older names are read too (``checkpoint_reading``). Beside the weights, a checkpoint has Adam's moments
``exp_avg`` and ``exp_avg_sq`` of every parameter and under bf16 its float32 copy ``fp32_param`` (all in the parameter's
shape, sharded as it is), the number of steps once, and the state of FP8 scaling (``fp8_state``). Weights that are FP8
are saved as what they were rounded from. The rest of an optimizer's state (learning rate, betas, weight decay) comes
from the recipe and the schedule.

megatron-core's own state dicts would do neither: its two optimizers name their parts differently; its distributed one
(0.16 to 0.19, ``fully_reshardable``) saves moments from the wrong places as soon as a bucket of gradients has padding,
and with torch's Adam cannot load what it saved (no ``step``), or has all parameters share one step counter that each of
them advances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megatron_g2rpo.policy import checkpoint_reading, fp8_state
from megatron_g2rpo.policy.optimizer_shares import Spread, keeps_main_copies, piece, single, spreads
from megatron_g2rpo.policy.quantized import assign, is_float8tensor, value_of
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_g2rpo.weights.soundness import check_whole, flaw, refuse_flaws

Sharded = ShardedTensor | ShardedTensorFactory

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
_EXTRA = "._extra_state"

# callback(num_bytes), called after each parameter with the bytes that were moved.
Advance = Callable[[int], None]


def load_weights(model: MegatronModule, directory: str | Path, dtype: torch.dtype) -> None:
    """Load the weights of a checkpoint of any layout, with or without an optimizer's state. A collective of all ranks.

    Args:
        model: this rank's part of the model, without wrapper.
        directory: directory of the checkpoint.
        dtype: dtype of the model.

    Raises:
        CheckpointError: the checkpoint is damaged; or its weights have another dtype, lack some of the model's, have
            other shapes, or are not finite.
    """
    check_whole(Path(directory))
    found = MegatronCheckpoint(directory).dtypes
    if found != {dtype}:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in found))
        raise CheckpointError(f"{directory}: its weights are {names}; set policy.precision to that")
    template: Any = {"model": _sharded_weights(model)}
    _keep_what_is_in_place(template)
    try:
        state: Any = checkpoint_reading.load(template, directory)
    except (CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory} does not fit the model of policy.model_name: {error}") from error
    _load_weights(model, state["model"])
    value = value_of(None)  # of a quantised weight, what it was rounded from
    flaws = ((name, flaw(value(parameter), dtype)) for name, parameter in model.named_parameters())
    refuse_flaws([f"{name} {what}" for name, what in flaws if what], directory)


def _sharded_weights(model: MegatronModule) -> dict[str, Any]:
    """Return the sharded weights, without the extra state of Transformer Engine's modules.

    That is a pickle, so that nobody may read it from a file, and one for every layout. What of it a run needs to go on
    is saved as tensors, see ``fp8_state``.
    """
    state: Any = model.sharded_state_dict()
    return {name: entry for name, entry in state.items() if not name.endswith(_EXTRA)}


def _load_weights(model: MegatronModule, state: Mapping[str, Any]) -> None:
    found: Any = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(_EXTRA)]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"weights that were loaded lack {missing}, and have {found.unexpected_keys} too many")
    for name, parameter in model.named_parameters():
        if is_float8tensor(tensor=parameter):
            assign(parameter, state[name])


def _keep_what_is_in_place(template: Any) -> None:
    """Avoid the copies that megatron-core makes of gate and up projections after loading: a third of a model.

    megatron-core saves a gate and up projection as two tensors, loads them as two views of the parameter, and would
    then concatenate the views.
    """
    for entry in nested_values(x=template):
        if isinstance(entry, ShardedTensorFactory):
            entry.merge_fn = partial(_merge, entry.data, entry.merge_fn)


def _merge(parameter: Tensor, merge: Callable[[Any], Tensor], parts: Any) -> Tensor:
    storage = parameter.untyped_storage().data_ptr()
    in_place = all(part.untyped_storage().data_ptr() == storage for part in nested_values(x=parts))
    return parameter if in_place else merge(parts)


def sharded_state_dict(
    model: MegatronModule,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Return the state dict that ``dist_checkpointing`` saves or fills. A collective of the data-parallel ranks.

    Args:
        model: this rank's part of the model, without wrapper; its weights must be current on every rank.
        optimizer, scheduler: the policy's optimizer and schedule; None for a policy that does not learn.
        is_loading: whether the result is a template to load into.
    """
    state: dict[str, Any] = {"model": _sharded_weights(model)}
    if optimizer is not None and scheduler is not None:
        part = single(optimizer)
        _prefill(part)
        entries = _entries(state["model"])
        tensors: dict[Any, Any]
        if isinstance(part, DistributedOptimizer):
            tensors = dict(_distributed(part, entries, is_loading))
        else:
            tensors = dict(_replicated(part, entries))
        state["optimizer"] = {"state": tensors if is_loading else {**tensors, "common_step": _step(part)}}
        state["scheduler"] = scheduler.state_dict()
    if not is_loading:
        _save_unquantised(state["model"], value_of(optimizer))
    if scaling := fp8_state.sharded_state_dict(model):
        state["fp8"] = scaling
    return state


def _save_unquantised(model_state: dict[str, Any], value: Callable[[Any], Tensor]) -> None:
    """Replace quantised weights by what they were rounded from, so that a run in other arithmetic can go on from it."""
    for entry in nested_values(x=model_state):
        if isinstance(entry, Sharded) and entry.data is not None and is_float8tensor(tensor=entry.data):
            whole = value(entry.data)
            # Only one copy is written; the others are there for their shape and dtype.
            other = torch.empty((), dtype=whole.dtype).expand(whole.shape)
            entry.data = whole.cpu() if is_main_replica(replica_id=entry.replica_id) else other


def load_state_dict(
    model: MegatronModule,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: Mapping[str, Any],
) -> None:
    """Restore what ``dist_checkpointing.load`` returned for ``sharded_state_dict(is_loading=True)``.

    Where weights are quantised, a rank has only its share of the new ones afterwards, as after an optimizer step.

    Args:
        model: this rank's part of the model, without wrapper.
        optimizer, scheduler: the policy's optimizer and schedule; None for a policy that does not learn.
        state: the loaded state.
    """
    _load_weights(model, state["model"])
    scaling = state.get("fp8", {})
    fp8_state.load_state_dict(model, scaling)
    if optimizer is None or scheduler is None:
        return
    part = single(optimizer)
    tensors = dict(state["optimizer"]["state"])
    step = int(tensors.pop("common_step"))
    if isinstance(part, DistributedOptimizer):
        _load_distributed(part, tensors)
    else:
        _load_replicated(part, tensors)
    _set_step(part, step)
    if any(is_float8tensor(tensor=parameter) for parameter in model.parameters()):
        part._copy_main_params_to_model_params()  # as after a step: the checkpoint has no quantised weights
        fp8_state.load_state_dict(model, scaling)  # that has counted the weights' amaxes
    scheduler.num_steps = 0  # load_state_dict adds to it
    scheduler.load_state_dict(state_dict=state["scheduler"])


# -- every data-parallel rank has the whole state ---------------------------------------------------------------------


def _replicated(optimizer: Any, entries: Mapping[int, Sharded]) -> Iterator[tuple[int, dict[str, Sharded]]]:
    for number, parameter in enumerate(_parameters(optimizer)):
        yield number, _sharded(entries[id(parameter)], _state(optimizer, _main(optimizer, parameter)))


def _load_replicated(optimizer: Any, loaded: Mapping[Any, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(_parameters(optimizer)):
            for name, tensor in _state(optimizer, _main(optimizer, parameter)).items():
                tensor.copy_(loaded[number][name])


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the model's parameters that the optimizer updates."""
    if keeps_main_copies(optimizer):
        return [parameter for group in optimizer.float16_groups for parameter in group]
    return optimizer.get_parameters()


def _main(optimizer: Any, parameter: Any) -> Tensor:
    return parameter.main_param if keeps_main_copies(optimizer) else parameter


# -- data-parallel ranks share the state ------------------------------------------------------------------------------


def _distributed(
    optimizer: DistributedOptimizer, entries: Mapping[int, Sharded], is_loading: bool
) -> Iterator[tuple[int, dict[str, Sharded]]]:
    """Iterate over the sharded state of parameters by number.

    To save, these are the parameters that this rank owns; to load, all of which it has a piece.
    """
    rank = optimizer.data_parallel_group.rank()
    for number, spread in enumerate(spreads(optimizer)):
        if rank not in spread.pieces:
            continue
        shares = _state(optimizer, piece(optimizer, spread.parameter))
        if is_loading:
            whole = {name: torch.empty(spread.parameter.shape, dtype=share.dtype) for name, share in shares.items()}
        else:
            whole = {name: _collect(optimizer, spread, share) for name, share in shares.items()}
        if is_loading or rank == spread.owner:
            entry = entries[id(spread.parameter)]
            model_parallel: Any = entry.replica_id  # (..., data-parallel rank)
            copy = 0 if rank == spread.owner else 1 + rank  # megatron-core wants exactly one copy numbered 0
            yield number, _sharded(replace(entry, replica_id=(*model_parallel[:-1], copy)), whole)


def _collect(optimizer: DistributedOptimizer, spread: Spread, share: Tensor) -> Tensor:
    """Return the whole tensor, on the CPU; it is complete on the owner only. Pieces travel through host memory."""
    group: Any = optimizer.data_parallel_group_gloo
    whole = torch.empty(spread.parameter.numel(), dtype=share.dtype)
    whole[spread.pieces[group.rank()]] = share.detach().cpu()
    for sender, where in spread.pieces.items():
        if sender == spread.owner:
            continue
        if group.rank() == spread.owner:
            dist.recv(whole[where], group=group, group_src=sender)
        elif group.rank() == sender:
            dist.send(whole[where], group=group, group_dst=spread.owner)
    return whole.view(spread.parameter.shape)


def _load_distributed(optimizer: DistributedOptimizer, loaded: Mapping[Any, Mapping[str, Tensor]]) -> None:
    rank = optimizer.data_parallel_group.rank()
    with torch.no_grad():
        for number, spread in enumerate(spreads(optimizer)):
            if rank not in spread.pieces:
                continue
            for name, share in _state(optimizer, piece(optimizer, spread.parameter)).items():
                share.copy_(loaded[number][name].flatten()[spread.pieces[rank]])


# -- both -------------------------------------------------------------------------------------------------------------


def _entries(model_state: Any) -> dict[int, Sharded]:
    sharded, _ = extract_sharded_tensors_and_factories(sharded_state_dict=model_state)
    return {id(entry.data): entry for entry in nested_values(x=sharded)}


def _sharded(entry: Sharded, tensors: Mapping[str, Tensor]) -> dict[str, Sharded]:
    """Return tensors of a parameter's shape as sharded tensors, sharded like the parameter's ``entry``."""
    return {
        name: make_sharded_optimizer_tensor(model_param=entry, optim_param=tensor, prefix=f"optimizer.state.{name}")
        for name, tensor in tensors.items()
    }


def _state(optimizer: Any, main: Tensor) -> dict[str, Tensor]:
    """Return the part of the optimizer's state of ``main``, the tensor that it updates, that a checkpoint keeps."""
    tensors = {name: optimizer.state[main][name] for name in MOMENTS}
    return {**tensors, MAIN: main.detach()} if keeps_main_copies(optimizer) else tensors


def _prefill(optimizer: Any) -> None:
    """Make moments of zero where no step was taken yet.

    torch's Adam makes its own only where there is no state at all.
    """
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if _counts_per_parameter(optimizer):
        for state in optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _counts_per_parameter(optimizer: Any) -> bool:
    """Return whether the optimizer counts steps for each parameter.

    torch's Adam counts beside the moments, fused ones (Transformer Engine, apex) in the parameter group.
    """
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _step(optimizer: Any) -> int:
    holders = optimizer.state.values() if _counts_per_parameter(optimizer) else optimizer.param_groups
    steps = {int(holder.get("step", 0)) for holder in holders}
    if len(steps) > 1:
        raise RuntimeError(f"parameters of one optimizer took different numbers of steps: {sorted(steps)}")
    return steps.pop() if steps else 0


def _set_step(optimizer: Any, step: int) -> None:
    if _counts_per_parameter(optimizer):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(step))  # one each: Adam adds to it in place
    else:
        for group in optimizer.param_groups:
            group["step"] = step
