# SPDX-License-Identifier: Apache-2.0
"""FP8 arithmetic of the language layers: what it needs, and what megatron-core is told about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.machine import Machine
from megatron_g2rpo.recipe import MegatronConfig

_KEY = "policy.megatron_cfg"
_NONE: tuple[int, int] = (0, 0)  # version of what a machine lacks


def check_fp8(megatron: MegatronConfig, layers: str, machine: Machine) -> None:
    """Refuse FP8 arithmetic that the machine, or the library, does not have.

    Args:
        megatron: the recipe's ``policy.megatron_cfg``.
        layers: modules of the language layers, ``local`` or ``transformer_engine``.
        machine: the machine's facts.

    Raises:
        KernelError: names the key, the reason and what to set.
    """
    fp8 = megatron.fp8_cfg
    if not fp8.enabled:
        return
    if layers != "transformer_engine":
        raise KernelError(
            f"{_KEY}.fp8_cfg.enabled needs the layers of Transformer Engine (megatron-core would ignore it on others): "
            f"set {_KEY}.transformer_impl=transformer_engine on a GPU, or fp8_cfg.enabled=false"
        )
    _check_hardware(fp8.fp8_recipe, machine)
    if fp8.fp8_param and fp8.fp8_recipe == "mxfp8":
        raise KernelError(
            f"{_KEY}.fp8_cfg.fp8_param with fp8_recipe=mxfp8 needs gradient buffers that are reused for the gather of "
            "weights, which this policy does not set up: set fp8_param=false"
        )
    if fp8.fp8_param and not megatron.distributed_data_parallel_config.use_distributed_optimizer:
        raise KernelError(
            f"{_KEY}.fp8_cfg.fp8_param needs {_KEY}.distributed_data_parallel_config.use_distributed_optimizer=true: "
            "only megatron-core's distributed optimizer updates FP8 weights from float32 copies"
        )


def _check_hardware(recipe: str, machine: Machine) -> None:
    """Refuse a recipe that Transformer Engine has no kernels for on this GPU, or with this CUDA."""
    capability, cuda = machine.capability or _NONE, machine.cuda_version or _NONE
    has = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    key = f"{_KEY}.fp8_cfg.fp8_recipe"
    if capability < (8, 9):
        raise KernelError(
            f"{_KEY}.fp8_cfg.enabled needs a GPU of compute capability 8.9 (Ada, Hopper) or above, and {has}: set it "
            "to false"
        )
    if recipe == "blockwise" and capability < (9, 0):
        raise KernelError(f"{key}=blockwise needs compute capability 9.0 (Hopper) or above, and {has}: set tensorwise")
    if recipe == "blockwise" and cuda < (12, 9):
        raise KernelError(
            f"{key}=blockwise needs CUDA 12.9 or above, and torch was built for {cuda[0]}.{cuda[1]}: set tensorwise, "
            "or install a torch for a later CUDA"
        )
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        raise KernelError(
            f"{key}=mxfp8 needs a data-centre Blackwell GPU (compute capability 10.0 to 11.x), and {has}: set "
            "blockwise or tensorwise"
        )


def fp8_fields(megatron: MegatronConfig) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` that say what is computed in FP8."""
    fp8 = megatron.fp8_cfg
    if not fp8.enabled:
        return {}
    return {
        "fp8": fp8.fp8,
        "fp8_recipe": fp8.fp8_recipe,
        "fp8_param": fp8.fp8_param,
        # Of delayed scaling, Transformer Engine's own defaults. megatron-core's, the last micro-batch's amax alone,
        # lets a larger one saturate, which costs gradient (docs/fp8.md).
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": megatron.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": megatron.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": megatron.num_layers_at_end_in_bf16,
    }


@contextmanager
def unmoved_scales(model: nn.Module) -> Iterator[None]:
    """Run a pass without gradient that leaves delayed scaling as it was.

    Transformer Engine moves scales only after passes with gradient, but every pass enters the largest magnitudes that
    it sees: those of a log-probability pass, perhaps with a reference policy's weights, would set the scales of the
    next training step. Recipes without delayed scales are not touched.

    Args:
        model: the model that the pass runs.
    """
    before = {id(module): history[0].clone() for module, history in _histories(model)}
    try:
        yield
    finally:
        with torch.no_grad():
            for module, history in _histories(model):
                # Row 0 is what was seen since the scales moved; a module that first ran just now had seen nothing.
                seen = before.get(id(module))
                history[0].zero_() if seen is None else history[0].copy_(seen)


def _histories(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each module that delayed scaling has state of, and its ``[length, slots]`` history of forward passes."""
    for module in model.modules():
        state = getattr(module, "fp8_meta", {}).get("scaling_fwd")
        history = getattr(state, "amax_history", None)
        if history is not None:
            yield module, history
