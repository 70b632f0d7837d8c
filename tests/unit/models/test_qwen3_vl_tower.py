# SPDX-License-Identifier: Apache-2.0
"""Claim: Qwen3-VL's tower, run on many images at once, gives transformers' own features and gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_g2rpo.models import qwen3_vl_tower
from megatron_g2rpo.models.qwen3_vl import Qwen3VLVision
from megatron_g2rpo.models.qwen3_vl_tower import attention, frame_runs
from tests.common.compare import largest_distance, relative_distance
from tests.common.tiny_model import make_tiny_qwen3vl

VISION = Qwen3VLVision()
# The same sums in another order.
EXACT = 1e-5
# Rounding to 8 bits at every operation, of which a gradient passes dozens: both towers are within this of float32.
ROUNDED = 0.06

ROWS: dict[str, list[list[int]]] = {
    "one image": [[1, 4, 6]],
    "equal": [[1, 4, 6]] * 5,
    "equal in area alone": [[1, 4, 6], [1, 6, 4], [1, 2, 12]],
    "different": [[1, 4, 6], [1, 2, 4], [1, 8, 6], [1, 2, 2]],
    "equal neighbours among others": [[1, 2, 4], [1, 4, 6], [1, 4, 6], [1, 2, 2], [1, 2, 4]],
    "frames": [[3, 4, 6], [1, 4, 6], [2, 2, 4]],
}


def towers(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The family's tower, and transformers' own with ``sdpa``, both with the same random weights."""
    config, model = make_tiny_qwen3vl()
    theirs = model.model.visual.to(torch.float32)
    assert theirs.config._attn_implementation == "sdpa"
    ours = VISION.tower(config, dtype)
    ours.load_state_dict(theirs.state_dict())
    if dtype != torch.float32:
        for parameter in theirs.parameters():  # not the rotary frequencies
            parameter.data = parameter.data.to(dtype)
    return ours, theirs


def their_features(tower: Any, pixels: Tensor, grids: Tensor) -> Tensor:
    output = tower(pixels, grid_thw=grids)
    return torch.stack([output.pooler_output, *output.deepstack_features], dim=1)


def row(grids: list[list[int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(grids)
    pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(1))
    return pixels.to(dtype), sizes


def learnt(tower: Any, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The features, and the gradient of every parameter under a random one of the features."""
    features.backward(torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features.dtype))
    return features.detach(), {name: parameter.grad.float() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("name", ROWS)
def test_features_and_gradients_are_transformers_own(name: str) -> None:
    ours, theirs = towers()
    pixels, grids = row(ROWS[name])
    features, gradients = learnt(ours, VISION.features(ours, pixels, grids))
    expected, their_gradients = learnt(theirs, their_features(theirs, pixels, grids))
    assert relative_distance(features, expected) < EXACT
    assert largest_distance(gradients, their_gradients) < EXACT


@pytest.mark.parametrize("name", ["equal", "different"])
def test_bfloat16_is_as_near_to_float32_as_transformers_own(name: str) -> None:
    _, exact = towers()
    rounded = towers(torch.bfloat16)
    expected, gradients = learnt(exact, their_features(exact, *row(ROWS[name])))
    for tower, run in zip(rounded, (VISION.features, their_features), strict=True):
        features, mine = learnt(tower, run(tower, *row(ROWS[name], torch.bfloat16)))
        assert features.dtype == torch.bfloat16
        assert relative_distance(features, expected) < ROUNDED
        assert largest_distance(mine, gradients) < ROUNDED


@pytest.mark.parametrize("name", ["equal neighbours among others", "frames"])
def test_recomputed_blocks_give_the_same(name: str) -> None:
    kept, _ = towers()
    recomputed, _ = towers()
    recomputed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    recomputed.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    pixels, grids = row(ROWS[name])
    features, gradients = learnt(recomputed, VISION.features(recomputed, pixels, grids))
    expected, theirs = learnt(kept, VISION.features(kept, pixels, grids))
    assert len(calls) == 2
    assert torch.equal(features, expected)
    assert largest_distance(gradients, theirs) == 0


@pytest.mark.parametrize(
    ("name", "runs"),
    [("equal", 1), ("equal in area alone", 1), ("different", 4), ("equal neighbours among others", 4), ("frames", 2)],
)
def test_neighbours_of_equal_size_are_one_call(name: str, runs: int) -> None:
    ours, _ = towers()
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as calls:
        VISION.features(ours, *row(ROWS[name]))
    assert calls.call_count == runs * len(ours.blocks)


def test_runs_of_frames() -> None:
    assert frame_runs([(2, 4, 6), (1, 6, 4), (1, 2, 2), (1, 4, 6)]) == ((3, 24), (1, 4), (1, 24))


def test_an_image_sees_no_other() -> None:
    ours, _ = towers()
    pixels, grids = row(ROWS["equal"])
    before = VISION.features(ours, pixels, grids)
    pixels[24:48] += 1.0  # the second of five
    changed = (VISION.features(ours, pixels, grids) - before).abs().flatten(1).amax(1).split(6)
    assert [bool(image.any()) for image in changed] == [False, True, False, False, False]


def test_positions_that_generation_computed_serve_a_pass_that_learns() -> None:
    """Kept tensors of ``inference_mode`` cannot be saved for a backward pass."""
    ours, _ = towers()
    qwen3_vl_tower._places.cache_clear()
    with torch.inference_mode():
        VISION.features(ours, *row(ROWS["one image"]))
    learnt(ours, VISION.features(ours, *row(ROWS["one image"])))
    assert qwen3_vl_tower._places.cache_info().hits == 1


def test_another_tower_is_refused() -> None:
    """It would take all images of a row for one, and say nothing."""
    _, theirs = towers()
    with pytest.raises(ValueError, match=r"attends with 'sdpa'.*Vision\.tower"):
        VISION.features(theirs, *row(ROWS["equal"]))


def test_a_mask_is_refused() -> None:
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        attention(torch.nn.Identity(), query, query, query, torch.ones(4, 4), scaling=1.0)
    with pytest.raises(ValueError, match="takes no mask"):
        attention(torch.nn.Identity(), query, query, query, None, scaling=1.0, is_causal=True)


def test_building_a_tower_leaves_the_model_s_config_alone() -> None:
    config, model = make_tiny_qwen3vl()
    VISION.tower(config, torch.float32)
    assert model.model.visual.config._attn_implementation == "sdpa"
