# SPDX-License-Identifier: Apache-2.0
"""Parameters whose values are FP8 (``fp8_cfg.fp8_param``): what value they have, and how they get one.

Such a parameter is what the last rounding left of a value that somebody else holds: the optimizer, in its float32 copy,
or, until there is an optimizer, Transformer Engine, in the copy of the initial value that the optimizer will take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_g2rpo.policy.optimizer_shares import main_copy, single, spreads

_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # weights are e4m3 in both formats, e4m3 and hybrid


def value_of(optimizer: MegatronOptimizer | None) -> Callable[[nn.Parameter], Tensor]:
    """Return the function that gives a parameter's value, as a tensor of its (nominal) dtype that is not quantised.

    Of a quantised parameter it is the float32 copy, rounded, or the initial value; its own value where there is
    neither. The function is a collective of the data-parallel ranks, which call it for the same parameters in the same
    order.

    Args:
        optimizer: the policy's optimizer; None for a policy that does not learn.
    """
    part = None if optimizer is None else single(optimizer)
    shared = isinstance(part, DistributedOptimizer)
    spread_of = {spread.parameter: spread for spread in spreads(part)} if shared else {}

    def value(parameter: nn.Parameter) -> Tensor:
        if not is_float8tensor(tensor=parameter):
            return parameter.data
        if optimizer is not None and parameter.requires_grad:
            return main_copy(optimizer, parameter, spread_of.get(parameter)).to(parameter.dtype)
        initial = _initial(parameter)
        return dequantize_fp8_tensor(fp8_tensor=parameter) if initial is None else initial

    return value


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a value, as it will be when the optimizer is built on it.

    Args:
        parameter: the parameter, quantised or not.
        value: what it is to hold, in its shape.
    """
    if is_float8tensor(tensor=parameter):
        _start_scale(parameter, value)
    parameter.detach().copy_(value)
    if is_float8tensor(tensor=parameter) and (initial := _initial(parameter)) is not None:
        initial.copy_(value)  # the optimizer would take what the memory held before weights were loaded


def _start_scale(parameter: Any, value: Tensor) -> None:
    """Set a delayed scale by the value that it is about to round; other recipes keep none.

    Transformer Engine has rounded what the memory held when the module was built, by a scale of 1. The magnitude of
    that would stay in the history, and hold the scale down, for as many passes as the history is long; where it was no
    number the scale would stay 1. And a scale of 1 would serve until the first optimizer step, whereas a weight that is
    rounded in every pass has one of its own from the second micro-batch on.

    Each rank takes the scale of its own shard. The first pass with gradient reduces amaxes, and gives all ranks one.
    """
    quantizer = parameter._get_quantizer()
    scale, seen = getattr(quantizer, "scale", None), getattr(quantizer, "amax", None)
    if scale is None or seen is None:
        return
    seen.zero_()
    amax = value.abs().max().to(device=scale.device, dtype=torch.float32)
    new = _LARGEST / amax
    scale.copy_(torch.where(new.isfinite(), new, 1.0))


def _initial(parameter: Any) -> Tensor | None:
    """Return Transformer Engine's copy of the value from before quantisation, in host memory, while there is one."""
    kept = getattr(parameter, "get_high_precision_init_val", None)
    return None if kept is None else kept()
