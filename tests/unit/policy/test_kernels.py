# SPDX-License-Identifier: Apache-2.0
"""Claim: kernels that cannot run are refused before anything starts, and those that run are named, with the reason."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.kernels import Kernels, check_heads, check_training, choose
from megatron_g2rpo.policy.layouts.layout import layout_of
from megatron_g2rpo.policy.machine import OPTIONAL, Machine
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import tiny_config

NONE = dict.fromkeys(OPTIONAL, False)
CPU = Machine(device="cpu", capability=None, cuda_version=None, packages=NONE)


def gpu(*packages: str) -> Machine:
    """A Hopper with these optional packages."""
    return Machine(
        device="gpu", capability=(9, 0), cuda_version=(13, 0), packages={**NONE, **dict.fromkeys(packages, True)}
    )


ENGINE = gpu("transformer_engine")
LOCAL = {"transformer_impl": "local", "core_attention": "local"}


def kernels_of(
    machine: Machine, *, precision: str = "bfloat16", tp: int = 1, cp: int = 1, **megatron: object
) -> Kernels:
    section = layout_options("model", tp=tp, cp=cp, precision=precision, **megatron)
    return choose(section, layout_of(section.megatron_cfg), machine)


# -- what is chosen -----------------------------------------------------------------------------------------------


def test_a_gpu_has_the_layers_of_transformer_engine() -> None:
    kernels = kernels_of(ENGINE)
    assert (kernels.layers, kernels.attention) == ("transformer_engine", "transformer_engine")
    assert (kernels.optimizer, kernels.gradient_norm) == ("transformer_engine", "transformer_engine")


def test_a_cpu_has_local_layers() -> None:
    kernels = kernels_of(CPU, precision="float32", cp=2)
    assert (kernels.layers, kernels.attention, kernels.optimizer) == ("local", "local", "torch")
    assert kernels.context_parallel == "all_gather", "cp_comm_type is Transformer Engine's"


def test_local_layers_take_the_optimizer_that_megatron_core_finds() -> None:
    """Its order of imports: Transformer Engine, NVIDIA apex, torch; the recipe has no say."""
    for packages, expected in (
        (("transformer_engine", "apex"), "transformer_engine"),
        (("apex",), "apex"),
        ((), "torch"),
    ):
        kernels = kernels_of(gpu(*packages), **LOCAL)
        assert (kernels.layers, kernels.optimizer, kernels.gradient_norm) == ("local", expected, expected)


def test_layers_and_attention_are_chosen_apart() -> None:
    kernels = kernels_of(ENGINE, core_attention="local")
    assert (kernels.layers, kernels.attention) == ("transformer_engine", "local")


def test_collectives_are_named() -> None:
    assert kernels_of(ENGINE).tensor_parallel == "none"
    assert kernels_of(ENGINE, tp=2).tensor_parallel == "all_reduce"
    assert kernels_of(ENGINE, tp=2, sequence_parallel=True).tensor_parallel == "reduce_scatter"
    assert kernels_of(ENGINE).context_parallel == "none"
    assert kernels_of(ENGINE, cp=2, cp_comm_type="a2a").context_parallel == "a2a"


def test_fusions_are_named() -> None:
    plain = kernels_of(ENGINE)
    assert (plain.rope, plain.activation, plain.weight_gradients) == ("torch", "torch", "autograd")
    fused = kernels_of(
        gpu("transformer_engine", "apex_wgrad"),
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=True,
    )
    assert (fused.rope, fused.activation) == ("transformer_engine", "compiled")
    assert fused.weight_gradients == "matrix product"


@pytest.mark.parametrize("machine", [CPU, ENGINE, gpu("apex", "transformer_engine")])
def test_every_choice_is_described_with_its_reason(machine: Machine) -> None:
    kernels = kernels_of(machine)
    described = kernels.describe()
    assert [what.replace(" ", "_") for what, *_ in described] == [f.name for f in fields(Kernels) if f.name != "why"]
    assert all(choice and why for _, choice, why in described)
    assert ("layers", kernels.layers, kernels.why["layers"]) in described


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["transformer_impl", "core_attention"])
def test_transformer_engine_on_a_cpu_is_refused(key: str) -> None:
    with pytest.raises(KernelError, match=rf"megatron_cfg\.{key}=transformer_engine needs a GPU; set auto or local"):
        kernels_of(CPU, **{key: "transformer_engine"})


@pytest.mark.parametrize("asked", ["auto", "transformer_engine"])
@pytest.mark.parametrize("key", ["transformer_impl", "core_attention"])
def test_a_gpu_without_transformer_engine_is_no_silent_fallback(key: str, asked: str) -> None:
    with pytest.raises(KernelError, match=rf"megatron_cfg\.{key}={asked} needs .* install the extra `te`"):
        kernels_of(gpu(), **{**LOCAL, key: asked})


@pytest.mark.parametrize(
    ("layout", "key", "multiple"),
    [
        ({"cp": 2}, "context_parallel_size", "sequences to multiples of 4"),
        ({"tp": 2, "sequence_parallel": True}, "sequence_parallel", "rows to multiples of 2"),
        ({"tp": 2, "cp": 2, "sequence_parallel": True}, "context_parallel_size", "sequences to multiples of 4"),
    ],
)
def test_float32_rows_with_padding_are_refused(layout: dict[str, object], key: str, multiple: str) -> None:
    with pytest.raises(KernelError, match=rf"megatron_cfg\.{key} pads {multiple} tokens.*precision=bfloat16"):
        kernels_of(ENGINE, precision="float32", **layout)  # pyright: ignore[reportArgumentType]
    kernels_of(ENGINE, precision="bfloat16", **layout)  # pyright: ignore[reportArgumentType]
    kernels_of(ENGINE, precision="float32", core_attention="local", **layout)  # pyright: ignore[reportArgumentType]


def test_float32_rows_without_padding_are_taken() -> None:
    for layout in ({}, {"tp": 2}):
        assert kernels_of(ENGINE, precision="float32", **layout).attention == "transformer_engine"


def test_the_gradient_fusion_needs_its_module() -> None:
    with pytest.raises(KernelError, match=r"gradient_accumulation_fusion needs fused_weight_gradient_mlp_cuda"):
        kernels_of(ENGINE, gradient_accumulation_fusion=True)
    with pytest.raises(KernelError, match=r"gradient_accumulation_fusion needs a GPU"):
        kernels_of(CPU, gradient_accumulation_fusion=True)


@pytest.mark.parametrize("machine", [CPU, gpu()])
def test_the_rope_fusion_needs_transformer_engine(machine: Machine) -> None:
    with pytest.raises(KernelError, match=r"apply_rope_fusion needs Transformer Engine on a GPU"):
        kernels_of(machine, apply_rope_fusion=True, **LOCAL)


def test_the_activation_fusion_needs_a_gpu() -> None:
    with pytest.raises(KernelError, match=r"bias_activation_fusion compiles a kernel for a GPU"):
        kernels_of(CPU, bias_activation_fusion=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "refused"),
    [
        (8, 2, 1, None),
        (8, 2, 2, r"the 1 key/value head\(s\) of a tensor-parallel rank \(2 over 2\)"),
        (6, 6, 2, r"the 3 attention head\(s\) of a tensor-parallel rank \(6 over 2\)"),
        (8, 1, 1, r"the 1 key/value head\(s\)"),
    ],
)
def test_heads_are_shared_out_whole(heads: int, kv_heads: int, tp: int, refused: str | None) -> None:
    config = tiny_config(heads=heads, kv_heads=kv_heads)
    section = layout_options("model", tp=tp, cp=2, precision="bfloat16", cp_comm_type="a2a")
    layout = layout_of(section.megatron_cfg)
    if refused is None:
        check_heads(choose(section, layout, ENGINE), layout, config)
    else:
        with pytest.raises(KernelError, match=rf"cp_comm_type=a2a .*{refused}.*: set cp_comm_type to p2p"):
            check_heads(choose(section, layout, ENGINE), layout, config)
    check_heads(kernels_of(ENGINE, tp=tp, cp=2, cp_comm_type="all_gather"), layout, config)
    check_heads(kernels_of(ENGINE, tp=tp, cp=2, cp_comm_type="a2a", core_attention="local"), layout, config)


@pytest.mark.parametrize("package", ["transformer_engine", "apex"])
def test_training_on_a_cpu_with_an_optimizer_of_gpus_is_refused(package: str) -> None:
    machine = Machine(device="cpu", capability=None, cuda_version=None, packages={**NONE, package: True})
    with pytest.raises(KernelError, match=r"megatron-core takes its optimizer wherever it can be imported"):
        check_training(kernels_of(machine), machine)
    check_training(kernels_of(CPU), CPU)
    check_training(kernels_of(ENGINE), ENGINE)
