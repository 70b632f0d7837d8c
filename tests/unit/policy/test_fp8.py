# SPDX-License-Identifier: Apache-2.0
"""What FP8 needs is refused before anything starts, by name; each on a machine that lacks just that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_g2rpo.policy.device import KernelError
from megatron_g2rpo.policy.fp8 import check_fp8, fp8_fields, unmoved_scales
from megatron_g2rpo.policy.kernels import choose
from megatron_g2rpo.policy.layouts.layout import (
    Layout,
    LayoutError,
    check_layout,
    check_model,
    layout_of,
    token_multiples,
)
from megatron_g2rpo.policy.machine import OPTIONAL, Machine
from megatron_g2rpo.recipe import MegatronConfig, Policy, RecipeError
from tests.common.policy_layout import layout_options, policy_section
from tests.common.tiny_model import tiny_config

ALL = dict.fromkeys(OPTIONAL, True)
HOPPER = Machine(device="gpu", capability=(9, 0), cuda_version=(13, 0), packages=ALL)
BLACKWELL = replace(HOPPER, capability=(10, 0))
ADA = replace(HOPPER, capability=(8, 9))
AMPERE = replace(HOPPER, capability=(8, 0))


def section(recipe: str, *overrides: str, format: str = "e4m3") -> Policy:
    own = ["enabled=true", f"fp8_recipe={recipe}", f"fp8={format}"]
    return policy_section("model", *(f"megatron_cfg.fp8_cfg.{key}" for key in own), "precision=bfloat16", *overrides)


def megatron(recipe: str, *overrides: str) -> MegatronConfig:
    return section(recipe, *overrides).megatron_cfg


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("tensorwise", AMPERE, r"fp8_cfg\.enabled needs a GPU of compute capability 8\.9 .* capability 8\.0"),
        ("delayed", AMPERE, r"capability 8\.9"),
        ("blockwise", ADA, r"fp8_recipe=blockwise needs compute capability 9\.0 .* capability 8\.9: set tensorwise"),
        (
            "blockwise",
            replace(HOPPER, cuda_version=(12, 8)),
            r"blockwise needs CUDA 12\.9 .* torch was built for 12\.8",
        ),
        ("mxfp8", HOPPER, r"mxfp8 needs a data-centre Blackwell GPU .* capability 9\.0: set blockwise or tensorwise"),
        ("mxfp8", replace(BLACKWELL, capability=(12, 0)), r"mxfp8 needs .* capability 12\.0"),
    ],
)
def test_a_recipe_without_kernels_is_refused(recipe: str, machine: Machine, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        check_fp8(megatron(recipe), "transformer_engine", machine)


@pytest.mark.parametrize(
    ("recipe", "machine"),
    [
        ("tensorwise", ADA),
        ("delayed", ADA),
        ("blockwise", HOPPER),
        ("blockwise", replace(HOPPER, cuda_version=(12, 9))),
        ("mxfp8", BLACKWELL),
        ("blockwise", BLACKWELL),
    ],
)
def test_a_recipe_with_kernels_is_chosen(recipe: str, machine: Machine) -> None:
    settings = section(recipe)
    assert choose(settings, layout_of(settings.megatron_cfg), machine).fp8 == recipe


@pytest.mark.parametrize(("recipe", "tokens"), [("delayed", 16), ("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_rows_are_aligned_by_the_recipe(recipe: str, tokens: int) -> None:
    layout = layout_of(megatron(recipe))
    assert layout.token_alignment == tokens
    assert token_multiples(layout) == (1, tokens)


def test_fp8_off_asks_nothing_of_the_machine() -> None:
    settings = policy_section("model").megatron_cfg
    assert not settings.fp8_cfg.enabled
    check_fp8(settings, "local", replace(AMPERE, device="cpu", capability=None, cuda_version=None))
    assert fp8_fields(settings) == {}
    assert layout_of(settings).token_alignment == 1


def test_delayed_scaling_has_the_history_that_fp8_md_measured() -> None:
    fields = fp8_fields(megatron("delayed"))
    assert (fields["fp8_amax_history_len"], fields["fp8_amax_compute_algo"]) == (1024, "max")


def test_local_layers_are_refused() -> None:
    with pytest.raises(KernelError, match=r"fp8_cfg\.enabled needs the layers of Transformer Engine"):
        check_fp8(megatron("tensorwise"), "local", HOPPER)


DISTRIBUTED = "megatron_cfg.distributed_data_parallel_config.use_distributed_optimizer"


def test_fp8_weights_need_the_distributed_optimizer() -> None:
    keys = ["megatron_cfg.fp8_cfg.fp8_param=true"]
    with pytest.raises(KernelError, match=r"fp8_param needs .*use_distributed_optimizer=true"):
        check_fp8(megatron("blockwise", *keys, f"{DISTRIBUTED}=false"), "transformer_engine", HOPPER)
    check_fp8(megatron("blockwise", *keys, f"{DISTRIBUTED}=true"), "transformer_engine", HOPPER)
    with pytest.raises(KernelError, match="fp8_param with fp8_recipe=mxfp8"):
        check_fp8(megatron("mxfp8", *keys, f"{DISTRIBUTED}=true"), "transformer_engine", BLACKWELL)


# -- recipes that contradict themselves ---------------------------------------------------------------------------


def test_mxfp8_with_e5m2_gradients_is_refused() -> None:
    with pytest.raises(RecipeError, match="mxfp8 and e5m2 gradients diverges: set fp8 to e4m3"):
        section("mxfp8", format="hybrid")


def test_delayed_scaling_cannot_leave_layers_out() -> None:
    with pytest.raises(RecipeError, match=r"delayed scaling .* cannot leave the first and last ones out"):
        section("delayed", "megatron_cfg.first_last_layers_bf16=true")
    section("tensorwise", "megatron_cfg.first_last_layers_bf16=true")


@pytest.mark.parametrize("key", ["fp8_wgrad", "fp8_margin", "fp8_dot_product_attention"])
def test_a_key_that_the_library_would_ignore_is_unknown(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key 'policy\.megatron_cfg\.fp8_cfg\.{key}'"):
        section("tensorwise", f"megatron_cfg.fp8_cfg.{key}=false")


# -- shapes -------------------------------------------------------------------------------------------------------

ALIGNED = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 256}


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ({"hidden": 40}, Layout(token_alignment=16), "multiples of 16, and a rank has 40 features of the hidden state"),
        ({"intermediate": 264}, Layout(token_alignment=16), "has 264 MLP features at tensor_model_parallel_size=1"),
        ({}, Layout(tensor=4, token_alignment=128), "multiples of 128, and a rank has 64 query features at .*size=4"),
        ({"head_dim": 32, "hidden": 128}, Layout(tensor=2, token_alignment=128), "has 64 query features"),
        ({"heads": 8, "kv_heads": 1, "head_dim": 32}, Layout(token_alignment=128), "320 query, key and value features"),
        ({"intermediate": 128}, Layout(tensor=2, token_alignment=128), "64 MLP features"),
    ],
)
def test_features_that_are_no_whole_blocks_are_refused(shape: dict[str, int], layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(tiny_config(**{**ALIGNED, **shape}), layout)
    check_layout(tiny_config(**{**ALIGNED, **shape}), replace(layout, token_alignment=1))


def test_the_vocabulary_and_the_vision_tower_may_have_any_size() -> None:
    config = tiny_config(**ALIGNED, vocab=161, vision_hidden=20, vision_heads=2)
    check_layout(config, Layout(tensor=2, token_alignment=128))


def test_more_layers_to_leave_out_than_a_stage_has() -> None:
    keys = ["first_last_layers_bf16=true", "num_layers_at_start_in_bf16=3", "num_layers_at_end_in_bf16=0"]
    overrides = [f"megatron_cfg.{key}" for key in keys]
    config = tiny_config(**ALIGNED, layers=4)
    check_model(config, megatron("tensorwise", *overrides))
    with pytest.raises(LayoutError, match=r"\(3\) and num_layers_at_end_in_bf16 \(1\) leave none"):
        check_model(config, megatron("tensorwise", *overrides, "megatron_cfg.num_layers_at_end_in_bf16=1"))
    with pytest.raises(LayoutError, match=r"num_layers_at_start_in_bf16=3 is more than 2, the model's 4 layers over"):
        check_model(config, megatron("tensorwise", *overrides, "megatron_cfg.pipeline_model_parallel_size=2"))
    off = layout_options("model", *overrides, pp=2).megatron_cfg  # counts only with FP8
    check_model(config, off)


# -- passes without gradient --------------------------------------------------------------------------------------


class _Delayed(nn.Module):
    """A module with the state that delayed scaling keeps."""

    def __init__(self, history: torch.Tensor | None) -> None:
        super().__init__()
        self.fp8_meta = {} if history is None else {"scaling_fwd": _State(history)}

    def see(self, largest: float) -> None:
        self.fp8_meta.setdefault("scaling_fwd", _State(torch.zeros(2, 3)))
        self.fp8_meta["scaling_fwd"].amax_history[0] += largest


class _State:
    def __init__(self, history: torch.Tensor) -> None:
        self.amax_history = history


def test_a_pass_without_gradient_leaves_histories_as_they_were() -> None:
    """Those of a module that had none are left empty, and a pass that fails leaves nothing behind either."""
    known, new = _Delayed(torch.arange(6.0).view(2, 3)), _Delayed(None)
    model = nn.Sequential(known, nn.Sequential(new), nn.Linear(2, 2))

    def fail() -> None:
        with unmoved_scales(model):
            known.see(5.0)
            new.see(7.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(known.fp8_meta["scaling_fwd"].amax_history, torch.arange(6.0).view(2, 3))
    assert torch.equal(new.fp8_meta["scaling_fwd"].amax_history, torch.zeros(2, 3))
