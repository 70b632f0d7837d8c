# SPDX-License-Identifier: Apache-2.0
"""Claim: weights are imported on a machine with a GPU and without Transformer Engine, and are those of any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.convert import import_hf as command
from megatron_g2rpo.policy import megatron
from megatron_g2rpo.policy.device import KernelError, select
from megatron_g2rpo.policy.machine import OPTIONAL, Machine
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint
from tests.common.recipes import SFT
from tests.common.tiny_model import make_tiny_qwen3vl

MEGATRON = "policy.megatron_cfg"
NONE = dict.fromkeys(OPTIONAL, False)
BARE_GPU = Machine(device="gpu", capability=(9, 0), cuda_version=(13, 0), packages=NONE)


def recipe_of(model: Path, *overrides: str) -> Recipe:
    settings = [f"policy.model_name={model}", "policy.precision=float32", "env.tasks={any: {}}", "cluster.device=cpu"]
    return recipes.load(SFT, [*settings, *overrides], "sft")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tiny_qwen3vl(tmp_path / "model")
    return tmp_path / "model"


def on_bare_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose kernels as for a GPU without any optional package; tensors stay on this machine's CPU."""
    for module in (command, megatron):
        monkeypatch.setattr(module, "this_machine", lambda device: BARE_GPU)


def test_an_import_chooses_local_layers_by_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has the tensors of one that a CPU wrote, bit for bit; training there is refused as ever."""
    command.import_hf(recipe_of(model), tmp_path / "of_a_cpu")
    on_bare_gpu(monkeypatch)
    command.import_hf(recipe_of(model), tmp_path / "of_a_gpu")
    one, other = (MegatronCheckpoint(tmp_path / name) for name in ("of_a_cpu", "of_a_gpu"))
    assert len(one) > 20
    assert list(one) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(KernelError, match="transformer_impl=auto needs Transformer Engine on a GPU"):
        megatron.MegatronPolicy(recipe_of(model).policy, select("cpu"), seed=0, max_steps=1)


@pytest.mark.parametrize("key", ["transformer_impl", "core_attention"])
def test_what_is_asked_for_by_name_is_refused(
    key: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_bare_gpu(monkeypatch)
    with pytest.raises(KernelError, match=f"{key}=transformer_engine needs Transformer Engine on a GPU"):
        command.import_hf(recipe_of(model, f"{MEGATRON}.{key}=transformer_engine"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_transformer_engine_is_installed_it_is_not_turned_off(model: Path) -> None:
    """FP8, say, needs its layers."""
    settings = recipe_of(model).policy
    full = Machine(device="gpu", capability=(9, 0), cuda_version=(13, 0), packages={**NONE, "transformer_engine": True})
    assert command.with_layers_at_hand(settings, full) == settings
    assert command.with_layers_at_hand(settings, BARE_GPU) != settings
