# SPDX-License-Identifier: Apache-2.0
"""FP8 arithmetic of the language layers: what it needs, and what megatron-core is told about it."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.machine import Machine
from megatron_g2rpo.recipe import MegatronConfig

_KEY = "policy.megatron_cfg"


def check_fp8(megatron: MegatronConfig, layers: str, machine: Machine) -> None:
    """Refuse FP8 arithmetic that the machine, or the library, does not have.

    Args:
        megatron: the recipe's ``policy.megatron_cfg``.
        layers: modules of the language layers, ``local`` or ``transformer_engine``.
        machine: the machine's facts.

    Raises:
        KernelError: names the key, the reason and what to set.
    """
    if megatron.fp8_cfg.enabled and layers != "transformer_engine":
        raise KernelError(
            f"{_KEY}.fp8_cfg.enabled needs the layers of Transformer Engine (megatron-core would ignore it on others): "
            f"set {_KEY}.transformer_impl=transformer_engine on a GPU, or fp8_cfg.enabled=false"
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
        "first_last_layers_bf16": megatron.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": megatron.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": megatron.num_layers_at_end_in_bf16,
    }
