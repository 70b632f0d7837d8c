# SPDX-License-Identifier: Apache-2.0
"""Which kernels the policy runs on this machine, and why; what cannot run is refused here, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.fp8 import check_fp8
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.policy.machine import Machine
from megatron_g2rpo.recipe import MegatronConfig, Policy

_KEY = "policy.megatron_cfg"


@dataclass(frozen=True)
class Kernels:
    """The kernels of a policy.

    Attributes:
        layers: modules of the language layers, ``local`` or ``transformer_engine``.
        attention: core attention, ``local`` or ``transformer_engine``.
        fp8: name of the FP8 recipe; None for none.
        why: name of a choice -> the reason for it, a phrase.
    """

    layers: str
    attention: str
    fp8: str | None
    why: dict[str, str]


def choose(policy: Policy, layout: Layout, machine: Machine) -> Kernels:
    """Return the kernels that a recipe's policy uses on a machine.

    Args:
        policy: the recipe's ``policy`` section.
        layout: its parallel sizes.
        machine: see ``machine.this_machine``.

    Raises:
        KernelError: something of it cannot run there; the message names the key, the reason and what to set.
    """
    megatron = policy.megatron_cfg
    layers, why_layers = _modules("transformer_impl", megatron.transformer_impl, machine)
    attention, why_attention = _modules("core_attention", megatron.core_attention, machine)
    _check_attention(policy, layout, attention)
    _check_fusions(megatron, layers, machine)
    check_fp8(megatron, layers, machine)
    fp8 = megatron.fp8_cfg.fp8_recipe if megatron.fp8_cfg.enabled else None
    why = {"layers": why_layers, "attention": why_attention}
    return Kernels(layers=layers, attention=attention, fp8=fp8, why=why)


def _modules(key: str, asked: str, machine: Machine) -> tuple[str, str]:
    if asked == "local":
        return "local", f"{key} asks for it"
    if machine.device == "cpu":
        if asked == "auto":
            return "local", "Transformer Engine needs a GPU"
        raise KernelError(f"{_KEY}.{key}=transformer_engine needs a GPU; set auto or local")
    if not machine.packages["transformer_engine"]:  # no silent fallback: the other is far slower
        raise KernelError(
            f"{_KEY}.{key}={asked} needs Transformer Engine on a GPU, and it is not installed: install the extra `te`, "
            f"or set {_KEY}.{key}=local"
        )
    return "transformer_engine", f"{key} asks for it" if asked != "auto" else "there is a GPU, and it is installed"


def _check_attention(policy: Policy, layout: Layout, attention: str) -> None:
    """Refuse rows that no attention of Transformer Engine takes: float32 ones with padding between sequences."""
    if attention != "transformer_engine" or policy.precision != "float32":
        return
    if token_multiples(layout) != (1, 1):
        raise KernelError(
            f"Transformer Engine has no attention in float32 for rows with padding, which this layout needs: set "
            f"policy.precision=bfloat16, or {_KEY}.core_attention=local"
        )


def _check_fusions(megatron: MegatronConfig, layers: str, machine: Machine) -> None:
    if megatron.gradient_accumulation_fusion and not machine.packages["apex_wgrad"]:
        raise KernelError(
            f"{_KEY}.gradient_accumulation_fusion needs fused_weight_gradient_mlp_cuda of NVIDIA apex (PyPI's `apex` "
            "is an unrelated project), for the output layer also under Transformer Engine; set it to false"
        )
    if megatron.apply_rope_fusion and not (machine.device == "gpu" and machine.packages["transformer_engine"]):
        raise KernelError(f"{_KEY}.apply_rope_fusion needs Transformer Engine on a GPU; set it to false")
