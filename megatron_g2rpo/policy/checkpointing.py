# SPDX-License-Identifier: Apache-2.0
"""The policy's state for megatron-core's distributed checkpoints: one format for every layout and either optimizer.

Beside the weights, a checkpoint has Adam's moments ``exp_avg`` and ``exp_avg_sq`` of every parameter, under bf16 its
float32 copy ``fp32_param`` (all in the parameter's shape, sharded as it is), and once the number of steps. What else an
optimizer knows (learning rate, betas, weight decay) comes from the recipe and the schedule.

megatron-core's own state dicts would do neither: its two optimizers name their parts differently, and with torch's Adam
its distributed optimizer cannot load what it saved (no ``step``), or lets all parameters share one step counter that
every one of them then advances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

Sharded = ShardedTensor | ShardedTensorFactory

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
_PREFIX = "optimizer.state"


def sharded_state_dict(
    model: MegatronModule,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """What ``dist_checkpointing`` saves, or fills. A collective of the data-parallel ranks.

    Args:
        model: this rank's part, without wrapper; its weights are current on every rank.
        optimizer, scheduler: None for a policy that does not learn.
        is_loading: the result is a template to load into.
    """
    state: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None and scheduler is not None:
        part = _single(optimizer)
        _prefill(part)
        tensors = _distributed if isinstance(part, DistributedOptimizer) else _replicated
        moments: dict[Any, Any] = tensors(part, state["model"], is_loading)
        state["optimizer"] = {"state": moments if is_loading else {**moments, "common_step": _step(part)}}
        state["scheduler"] = scheduler.state_dict()
    return state


def load_state_dict(
    model: MegatronModule,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: Mapping[str, Any],
) -> None:
    """Take what ``dist_checkpointing.load`` returned for ``sharded_state_dict(is_loading=True)``.

    Raises:
        ValueError: the checkpoint has no optimizer.
    """
    model.load_state_dict(state["model"])
    if optimizer is None or scheduler is None:
        return
    part = _single(optimizer)
    tensors = dict(state["optimizer"]["state"])
    if "common_step" not in tensors:
        raise ValueError("the checkpoint was saved by a policy without optimizer")
    step = int(tensors.pop("common_step"))
    if isinstance(part, DistributedOptimizer):
        _load_distributed(part, tensors)
    else:
        _load_replicated(part, tensors)
    _set_step(part, step)
    scheduler.num_steps = 0  # load_state_dict adds to it
    scheduler.load_state_dict(state_dict=state["scheduler"])


# -- every rank has the whole state -----------------------------------------------------------------------------------


def _replicated(optimizer: MegatronOptimizer, model_state: Mapping[str, Any], is_loading: bool) -> dict[Any, Any]:
    sharded = {id(entry.data): entry for entry in _entries(model_state)}
    return {
        number: {
            name: make_sharded_optimizer_tensor(
                model_param=sharded[id(parameter)], optim_param=tensor, prefix=f"{_PREFIX}.{name}"
            )
            for name, tensor in _tensors(optimizer, parameter).items()
        }
        for number, parameter in enumerate(_parameters(optimizer))
    }


def _load_replicated(optimizer: MegatronOptimizer, loaded: Mapping[Any, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(_parameters(optimizer)):
            for name, tensor in _tensors(optimizer, parameter).items():
                tensor.copy_(loaded[number][name])


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    """The model's parameters that the optimizer moves."""
    if _keeps_main_copies(optimizer):
        return [parameter for group in optimizer.float16_groups for parameter in group]
    return optimizer.get_parameters()


def _tensors(optimizer: MegatronOptimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    main: Any = parameter.main_param if _keeps_main_copies(optimizer) else parameter  # type: ignore[attr-defined]
    tensors = {name: optimizer.state[main][name] for name in MOMENTS}
    return {**tensors, MAIN: main.detach()} if main is not parameter else tensors


# -- data-parallel ranks share the state ------------------------------------------------------------------------------

# The parts are gathered on the first data-parallel rank, through host memory: the one that writes.
_GATHER = {"distrib_optim_fully_reshardable_mem_efficient": True}


def _distributed(optimizer: DistributedOptimizer, model_state: Any, is_loading: bool) -> dict[Any, Any]:
    state = optimizer.sharded_param_state_fully_reshardable(
        model_sharded_state_dict=model_state, is_loading=is_loading, metadata=_GATHER
    )
    return {number: dict(_renamed(optimizer, tensors)) for number, tensors in (state or {}).items()}


def _renamed(optimizer: DistributedOptimizer, tensors: Mapping[str, Sharded]) -> Iterator[tuple[str, Sharded]]:
    for name, entry in tensors.items():
        if name != "param":
            yield name, entry
        elif _keeps_main_copies(optimizer):  # without, the main copy is the weight itself
            yield MAIN, replace(entry, key=entry.key.replace(f"{_PREFIX}.param.", f"{_PREFIX}.{MAIN}.", 1))


def _load_distributed(optimizer: DistributedOptimizer, loaded: dict[Any, dict[str, Tensor]]) -> None:
    for state in optimizer.state.values():
        state.pop("step", None)  # it copies everything that the state holds, and no checkpoint has steps a parameter
    if not _keeps_main_copies(optimizer):
        weights = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
        loaded = {number: {**tensors, "param": weights[number].detach()} for number, tensors in loaded.items()}
    with torch.no_grad():
        optimizer.load_parameter_state_from_fully_reshardable(state_dict=loaded)


# -- both -------------------------------------------------------------------------------------------------------------


def _single(optimizer: MegatronOptimizer) -> Any:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if len(parts) != 1:
        raise NotImplementedError(f"a policy has one optimizer, not {len(parts)}: it has no experts")
    return parts[0]


def _keeps_main_copies(optimizer: MegatronOptimizer) -> bool:
    return optimizer.config.params_dtype is not torch.float32


def _entries(model_state: Any) -> list[Sharded]:
    sharded, _ = extract_sharded_tensors_and_factories(sharded_state_dict=model_state)
    return list(nested_values(x=sharded))


def _prefill(optimizer: Any) -> None:
    """Moments of zero where no step was taken yet; torch's Adam makes its own only where there is no state at all."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if _counts_per_parameter(optimizer):
        for state in optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _counts_per_parameter(optimizer: Any) -> bool:
    """Torch's Adam counts steps beside the moments, fused ones (Transformer Engine, apex) in the parameter group."""
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
