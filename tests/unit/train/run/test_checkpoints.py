# SPDX-License-Identifier: Apache-2.0
"""Claims: a checkpoint is whole or absent, old ones go, and what was saved comes back to the last bit."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_g2rpo.policy import sharded_state
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.retention import Retention
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory, layers=1, vision_depth=2, deepstack=(0,))
    return directory


def make_policy(model_dir: Path, precision: str = "float32", freeze_vision: bool = False) -> MegatronPolicy:
    settings = layout_options(model_dir, precision=precision, freeze_vision=freeze_vision)
    return MegatronPolicy(settings, select("cpu"), seed=0, max_steps=10)


def step(policy: MegatronPolicy) -> dict[str, float]:
    sequences = random_sequences(policy.hf_config)
    return policy.update(packer_for(policy.hf_config).pack(sequences, budget=80), toy_loss)


@pytest.mark.parametrize(
    ("precision", "freeze_vision"),
    [("float32", False), ("bfloat16", False), ("float32", True)],
    ids=["fp32", "bf16", "frozen-vision"],
)
def test_a_restored_policy_takes_the_same_steps(
    model_dir: Path, tmp_path: Path, precision: str, freeze_vision: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    straight = make_policy(model_dir, precision, freeze_vision)
    step(straight)
    checkpoints.save(1, straight, {"stream": {"position": 6}})
    expected = [step(straight) for _ in range(2)]

    restored = make_policy(model_dir, precision, freeze_vision)
    assert checkpoints.load(1, restored) == {"step": 1, "stream": {"position": 6}}
    assert [step(restored) for _ in range(2)] == expected
    for (name, one), (_, other) in zip(straight.stream(), restored.stream(), strict=True):
        assert torch.equal(one, other), name


def test_weights_are_loaded_where_they_are(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate and up projections megatron-core would make a copy of both."""
    straight, fresh = make_policy(model_dir), make_policy(model_dir)
    step(straight)
    Checkpoints(tmp_path, None).save(1, straight, {})
    merge, in_place = sharded_state._merge, []

    def watched(parameter: torch.Tensor, *arguments: Any) -> torch.Tensor:
        merged = merge(parameter, *arguments)
        in_place.append(merged is parameter)
        return merged

    monkeypatch.setattr(sharded_state, "_merge", watched)
    with fresh.device.megatron():
        sharded_state.load_weights(fresh.model, tmp_path / "step_1", torch.float32)
    assert in_place == [True]  # one layer
    for (name, one), (_, other) in zip(straight.stream(), fresh.stream(), strict=True):
        assert torch.equal(one, other), name


def test_the_weights_alone_would_not_do(model_dir: Path, tmp_path: Path) -> None:
    """The negative of the test above: without the optimizer's moments the steps differ."""
    straight = make_policy(model_dir)
    step(straight)
    saved = {name: tensor.clone() for name, tensor in straight.stream()}
    expected = [step(straight) for _ in range(2)]
    fresh = make_policy(model_dir)
    fresh.load(saved, source="the policy after its first step")
    first, second = [step(fresh) for _ in range(2)]
    assert first == expected[0]
    assert second != expected[1]


def test_the_newest_are_kept_and_an_unfinished_one_does_not_count(model_dir: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention(keep_top_k=2))
    assert not checkpoints.has(2)
    policy = make_policy(model_dir)
    for number in (2, 9, 10):  # as text, 10 comes before 9
        (tmp_path / f"step_{number + 90}.partial").mkdir(parents=True)  # of a job that was killed
        checkpoints.save(number, policy, {})
        assert checkpoints.has(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]


def test_a_save_leaves_no_process_behind(model_dir: Path, tmp_path: Path) -> None:
    """One that outlived a failed rank would hold its standard output open, and whoever reads that would wait."""
    Checkpoints(tmp_path, None).save(1, make_policy(model_dir), {})
    assert multiprocessing.active_children() == []
