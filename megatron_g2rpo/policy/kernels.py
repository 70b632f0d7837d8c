# SPDX-License-Identifier: Apache-2.0
"""Which kernels the policy runs on this machine, and why; what cannot run is refused here, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron_g2rpo import models
from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.fp8 import check_fp8
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.policy.machine import Machine
from megatron_g2rpo.recipe import MegatronConfig, Policy

_KEY = "policy.megatron_cfg"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of a policy.

    Attributes:
        layers: modules of the language layers, ``local`` or ``transformer_engine``.
        attention: core attention, ``local`` or ``transformer_engine``.
        fp8: name of the FP8 recipe; None for none.
        optimizer: what computes the update: ``torch``, ``transformer_engine`` or ``apex``.
        gradient_norm: what computes the norm of the gradient and clips it, named alike.
        rope: rotation of queries and keys, ``torch`` or ``transformer_engine``.
        activation: the gated activation of the MLP, ``torch`` or ``compiled``.
        weight_gradients: who adds a weight's gradient to the gradient buffer: ``autograd``, or the ``matrix product``.
        cross_entropy: what computes log-probabilities of the vocabulary; always ``chunks``.
        tensor_parallel: collectives of tensor parallelism, ``none``, ``all_reduce`` or ``reduce_scatter``.
        context_parallel: how attention exchanges keys and values, ``none`` or a value of ``cp_comm_type``.
        why: name of a choice, an attribute of this class -> the reason for it, a phrase.
    """

    layers: str
    attention: str
    fp8: str | None
    optimizer: str
    gradient_norm: str
    rope: str
    activation: str
    weight_gradients: str
    cross_entropy: str
    tensor_parallel: str
    context_parallel: str
    why: dict[str, str]

    def describe(self) -> list[tuple[str, str, str]]:
        """Return ``(what, choice, why)`` of every choice, as text for people."""
        names = [field.name for field in fields(self) if field.name != "why"]
        return [(name.replace("_", " "), getattr(self, name) or "none", self.why[name]) for name in names]


def choose(policy: Policy, layout: Layout, machine: Machine) -> Kernels:
    """Return the kernels that a recipe's policy uses on a machine; ``check_heads`` and ``check_training`` refuse more.

    Args:
        policy: the recipe's ``policy`` section.
        layout: its parallel sizes.
        machine: see ``machine.this_machine``.

    Raises:
        KernelError: something of it cannot run there; the message names the key, the reason and what to set.
    """
    megatron = policy.megatron_cfg
    layers = _modules("transformer_impl", megatron.transformer_impl, machine)
    attention = _modules("core_attention", megatron.core_attention, machine)
    _check_padding(policy, layout, attention[0])
    _check_fusions(megatron, machine)
    check_fp8(megatron, layers[0], machine)
    choices = {
        "layers": layers,
        "attention": attention,
        "fp8": _fp8(megatron),
        "optimizer": _optimizer(machine),
        "gradient_norm": _optimizer(machine),
        **_fusions(megatron),
        "cross_entropy": ("chunks", "logprob_chunk_size: the logits of a whole row never exist, so nothing is to fuse"),
        "tensor_parallel": _tensor_parallel(layout),
        "context_parallel": _context_parallel(megatron, layout, attention[0]),
    }
    why = {name: reason for name, (_, reason) in choices.items()}
    chosen: dict[str, Any] = {name: choice for name, (choice, _) in choices.items()}
    return Kernels(**chosen, why=why)


def check_heads(kernels: Kernels, layout: Layout, hf_config: Any) -> None:
    """Refuse an exchange of heads between context-parallel ranks that the model has too few heads for.

    ``cp_comm_type=a2a`` gives each of the C ranks whole heads of the whole row, so C must divide the query heads and
    the key/value heads that a tensor-parallel rank holds.

    Args:
        kernels: the kernels that ``choose`` returned.
        layout: the parallel sizes.
        hf_config: transformers' configuration of a registered family.

    Raises:
        KernelError: names the key, the numbers and what to set.
    """
    if kernels.context_parallel != "a2a":
        return
    sizes = models.family(hf_config.model_type).config(hf_config)
    for what, key in (("attention", "num_attention_heads"), ("key/value", "num_query_groups")):
        heads = max(1, sizes[key] // layout.tensor)  # ranks share a key/value head where there are too few
        if heads % layout.context:
            raise KernelError(
                f"{_KEY}.cp_comm_type=a2a shares heads out over context-parallel ranks, and context_parallel_size="
                f"{layout.context} does not divide the {heads} {what} head(s) of a tensor-parallel rank "
                f"({sizes[key]} over {layout.tensor}): set cp_comm_type to p2p or all_gather"
            )


def check_training(kernels: Kernels, machine: Machine) -> None:
    """Refuse to train on a CPU with the optimizer of a GPU.

    Raises:
        KernelError: names what is installed and what to do.
    """
    if machine.device == "cpu" and kernels.optimizer != "torch":
        name = {"transformer_engine": "Transformer Engine", "apex": "NVIDIA apex"}[kernels.optimizer]
        raise KernelError(
            f"{name} is installed, and megatron-core takes its optimizer wherever it can be imported, but it needs a "
            "GPU: train on a CPU in an environment without it, or set cluster.device=gpu"
        )


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


def _check_padding(policy: Policy, layout: Layout, attention: str) -> None:
    """Refuse rows that no attention of Transformer Engine takes: float32 ones with padding after a sequence.

    ``data.packing`` pads sequences to the first multiple and, after the last of them, rows to the second.
    """
    if attention != "transformer_engine" or policy.precision != "float32":
        return
    sequence, row = token_multiples(layout)
    causes = {
        "context_parallel_size": (sequence > 1, f"pads sequences to multiples of {sequence} tokens"),
        "sequence_parallel": (layout.sequence_parallel, f"pads rows to multiples of {row} tokens"),
        "fp8_cfg.enabled": (layout.token_alignment > 1, f"pads rows to multiples of {row} tokens"),
    }
    found = [f"{_KEY}.{key} {pads}" for key, (on, pads) in causes.items() if on]
    if found:
        raise KernelError(
            f"{found[0]}, and Transformer Engine has no attention in float32 for rows with padding: set "
            f"policy.precision=bfloat16, or {_KEY}.core_attention=local"
        )


def _check_fusions(megatron: MegatronConfig, machine: Machine) -> None:
    if megatron.gradient_accumulation_fusion and machine.device == "cpu":
        raise KernelError(f"{_KEY}.gradient_accumulation_fusion needs a GPU; set it to false")
    if megatron.gradient_accumulation_fusion and not machine.packages["apex_wgrad"]:
        raise KernelError(
            f"{_KEY}.gradient_accumulation_fusion needs fused_weight_gradient_mlp_cuda of NVIDIA apex (PyPI's `apex` "
            "is an unrelated project), for the output layer also under Transformer Engine; set it to false"
        )
    if megatron.apply_rope_fusion and not (machine.device == "gpu" and machine.packages["transformer_engine"]):
        raise KernelError(f"{_KEY}.apply_rope_fusion needs Transformer Engine on a GPU; set it to false")
    if megatron.bias_activation_fusion and machine.device == "cpu":
        raise KernelError(
            f"{_KEY}.bias_activation_fusion compiles a kernel for a GPU (torch.compile); set it to false on a CPU"
        )


def _fp8(megatron: MegatronConfig) -> tuple[str | None, str]:
    on = megatron.fp8_cfg.enabled
    return megatron.fp8_cfg.fp8_recipe if on else None, f"fp8_cfg.enabled is {str(on).lower()}"


def _optimizer(machine: Machine) -> tuple[str, str]:
    """Megatron-core decides by what it can import, on local layers too; the recipe has no say."""
    for package in ("transformer_engine", "apex"):
        if machine.packages[package]:
            return package, "it is installed, and megatron-core takes it first, whatever the layers"
    return "torch", "neither Transformer Engine nor NVIDIA apex is installed"


def _fusions(megatron: MegatronConfig) -> dict[str, tuple[str, str]]:
    choices = {
        "rope": ("apply_rope_fusion", "torch", "transformer_engine"),
        "activation": ("bias_activation_fusion", "torch", "compiled"),
        "weight_gradients": ("gradient_accumulation_fusion", "autograd", "matrix product"),
    }
    asked = {name: bool(getattr(megatron, key)) for name, (key, *_) in choices.items()}
    return {
        name: (fused if asked[name] else plain, f"{key} is {str(asked[name]).lower()}")
        for name, (key, plain, fused) in choices.items()
    }


def _tensor_parallel(layout: Layout) -> tuple[str, str]:
    if layout.tensor == 1:
        return "none", "tensor_model_parallel_size is 1"
    if layout.sequence_parallel:
        return "reduce_scatter", "sequence_parallel: and an all-gather before each column-parallel product"
    return "all_reduce", "sequence_parallel is false"


def _context_parallel(megatron: MegatronConfig, layout: Layout, attention: str) -> tuple[str, str]:
    if layout.context == 1:
        return "none", "context_parallel_size is 1"
    if attention == "local":
        return "all_gather", "the local attention always gathers keys and values"
    return megatron.cp_comm_type, "cp_comm_type asks for it"
