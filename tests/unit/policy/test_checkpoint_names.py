# SPDX-License-Identifier: Apache-2.0
"""Claims: checkpoints have Transformer Engine's names of norms, and those of version 0.3.0 and before, with local ones,
are read by whoever reads one; nothing else that is missing is forgiven; FP8 scaling that starts anew is announced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_g2rpo.commands.convert.export_hf import export
from megatron_g2rpo.policy import checkpoint_reading, fp8_state, layer_spec
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.weights import SafetensorsDirectory
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES, MegatronCheckpoint
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

LOCAL = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
ENGINE = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(path, layers=2, vision_depth=2, deepstack=(0,))
    return path


def build(directory: Path, *overrides: str, steps: int | None = 10, **keys: Any) -> MegatronPolicy:
    return MegatronPolicy(layout_options(directory, *overrides, **keys), select("cpu"), seed=0, max_steps=steps)


def step(policy: MegatronPolicy) -> dict[str, float]:
    return policy.update(packer_for(policy.hf_config).pack(random_sequences(policy.hf_config), budget=80), toy_loss)


def names_in(checkpoint: Path) -> set[str]:
    return set(checkpoint_reading.read_metadata(checkpoint).state_dict_metadata)


@pytest.mark.parametrize("mode", ["plain", "distributed"])
def test_a_checkpoint_of_version_0_3_0_is_resumed_loaded_and_exported(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layer_spec, "_LOCAL", replace(layer_spec._LOCAL, checkpoint_names={}))
        policy = build(directory, mode=mode)
        step(policy)
        Checkpoints(tmp_path, None).save(1, policy, {})
    old = tmp_path / "step_1"
    prefixes = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    layers = "language_model.decoder.layers."
    assert {f"{prefix}{layers}{name}" for prefix in prefixes for name in LOCAL} <= names_in(old)
    assert not any(name.endswith(ENGINE) for name in names_in(old))
    weights = {name: tensor.clone() for name, tensor in policy.stream()}
    expected = step(policy)

    resumed = build(directory, mode=mode)
    Checkpoints(tmp_path, None).load(1, resumed)
    Checkpoints(tmp_path / "new", None).save(1, resumed, {})
    assert {f"{prefix}{layers}{name}" for prefix in prefixes for name in ENGINE} <= names_in(
        tmp_path / "new" / "step_1"
    )
    assert not any(name.endswith(LOCAL) for name in names_in(tmp_path / "new" / "step_1"))
    assert step(resumed) == expected

    alone = build(old / MODEL_FILES, f"pretrained_checkpoint={old}", steps=None)
    source = old / MODEL_FILES
    export(MegatronCheckpoint(old), tmp_path / "hf", source=source, dtype="float32", max_shard_size="5GB")
    for found in (dict(alone.stream()), SafetensorsDirectory(tmp_path / "hf")):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_what_is_under_neither_name_stays_missing(directory: Path, tmp_path: Path) -> None:
    policy = build(directory, steps=None)
    Checkpoints(tmp_path, None).save(1, policy, {})
    template = policy.sharded_state_dict(is_loading=True)
    name = "language_model.decoder.layers.0.input_layernorm.weight"
    entry = template["model"][name]
    entry.key = entry.key.replace("linear_qkv.layer_norm_weight", "linear_qkv.layer_norm_scale")
    with pytest.raises((CheckpointingException, KeyError), match="layer_norm_scale"):
        checkpoint_reading.load({"model": template["model"]}, tmp_path / "step_1")


def test_scaling_goes_on_only_from_a_state_that_is_whole(tmp_path: Path) -> None:
    names = ["fp8.e4m3.layers.0.a.scaling_fwd.scale", "fp8.e4m3.layers.0.a.scaling_fwd.amax_history"]
    tensors = (torch.ones(3), torch.zeros(1, 3))

    def template() -> dict[str, ShardedTensor]:
        return {
            name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in zip(names, tensors, strict=True)
        }

    whole = {name: tensor.shape for name, tensor in zip(names, tensors, strict=True)}
    kept = template()
    fp8_state.keep_stored(kept, whole, tmp_path)
    assert list(kept) == names
    for stored in ({}, {names[0]: whole[names[0]]}, {**whole, names[1]: torch.Size([1024, 3])}):
        left = template()
        with pytest.warns(UserWarning, match="delayed scaling starts anew"):
            fp8_state.keep_stored(left, stored, tmp_path)
        assert left == {}
