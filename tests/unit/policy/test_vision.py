# SPDX-License-Identifier: Apache-2.0
"""Claims: each image is encoded once, and its features arrive where they belong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_g2rpo.models.qwen3_vl import Qwen3VLVision
from megatron_g2rpo.policy import vision
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.vision import VisionEncoder
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl, random_inputs

QWEN3_VL = Qwen3VLVision()
GRIDS = ((4, 6), (2, 4), (6, 4), (2, 2), (8, 6))


def tower_of(config: Any, model: Any) -> torch.nn.Module:
    """The family's tower with the weights of transformers' model."""
    tower = QWEN3_VL.tower(config, torch.float32)
    tower.load_state_dict(model.model.visual.state_dict())
    return tower


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_gathered_features_are_the_tower_s_own(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer in turn, the gather replaced by the concatenation that it stands for; seven peers leave some idle."""
    config, model = make_tiny_qwen3vl()
    (inputs,) = random_inputs(config, grids=[GRIDS])
    tower = tower_of(config, model)
    expected = QWEN3_VL.features(tower, inputs.pixel_values, inputs.image_grid_thw)

    parts: list[torch.Tensor] = []
    encoded: list[int] = []
    hook = tower.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))

    def collect(input_: torch.Tensor, **_: Any) -> torch.Tensor:
        parts.append(input_)
        return input_

    def whole(input_: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat(parts)

    encoders = [
        VisionEncoder(
            QWEN3_VL,
            tower,
            QWEN3_VL.geometry(config),
            torch.float32,
            torch.device("cpu"),
            SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank),  # type: ignore[arg-type]
            every_row=False,
        )
        for rank in range(size)
    ]
    monkeypatch.setattr(vision, "gather_from_sequence_parallel_region", collect)
    for encoder in encoders:
        encoder(inputs.pixel_values, inputs.image_grid_thw)
    assert sum(encoded) == len(inputs.pixel_values), "every patch is encoded by one peer"
    assert len({len(part) for part in parts}) <= 1, "a gather needs parts of one length"
    hook.remove()

    monkeypatch.setattr(vision, "gather_from_sequence_parallel_region", whole)
    features = encoders[0](inputs.pixel_values, inputs.image_grid_thw)
    assert features is not None
    index = torch.arange(len(expected))
    assert torch.allclose(features[index], expected, atol=1e-6)
    assert features.values.requires_grad


def test_a_row_without_images() -> None:
    config, model = make_tiny_qwen3vl()
    (inputs,) = random_inputs(config, grids=[()])
    group: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    tower = tower_of(config, model)
    arguments = (QWEN3_VL, tower, QWEN3_VL.geometry(config), torch.float32, torch.device("cpu"), group)
    assert VisionEncoder(*arguments, every_row=False)(inputs.pixel_values, inputs.image_grid_thw) is None

    # Every parameter has a gradient, and it is 0: what overlapped gradient reduction counts on.
    features = VisionEncoder(*arguments, every_row=True)(inputs.pixel_values, inputs.image_grid_thw)
    assert features is not None
    assert len(features.places) == 0
    features.values.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert torch.all(parameter.grad == 0), name


@pytest.mark.parametrize(("granularity", "calls"), [(None, 1), ("full", 2)])
def test_the_samples_of_a_group_share_one_encoding_and_recompute_it_at_most_once(
    tmp_path: Path, granularity: str | None, calls: int
) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    section = layout_options(tmp_path, recompute_granularity=granularity)
    policy = MegatronPolicy(section, select("cpu"), seed=0, max_steps=1)
    (batch,) = packer_for(config).pack(random_sequences(config, samples=3), budget=1000)
    patches: list[int] = []
    tower: Any = policy.model.vision_model
    tower.blocks[0].register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    policy.gradients([batch], toy_loss)
    distinct = {id(s.inputs): len(s.inputs.pixel_values) for s in random_sequences(config, samples=1)}
    assert patches == [sum(distinct.values())] * calls
    patches.clear()
    policy.logprobs([batch])
    assert len(patches) == 1
