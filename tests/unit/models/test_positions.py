# SPDX-License-Identifier: Apache-2.0
"""Claims: positions are transformers'; placeholders that do not match the images are refused."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rpo import models
from megatron_g2rpo.models.positions import mrope_positions
from tests.common.tiny_model import make_tiny_qwen3vl, random_inputs, tiny_config


def test_positions_equal_transformers() -> None:
    config, model = make_tiny_qwen3vl()
    for inputs in random_inputs(config, grids=[(), ((4, 6),), ((2, 4), (6, 4)), ((8, 2), (2, 2), (4, 4))]):
        ids = inputs.token_ids
        expected, _ = model.model.get_rope_index(
            ids[None],
            mm_token_type_ids=(ids == config.image_token_id).int()[None],
            image_grid_thw=inputs.image_grid_thw,
        )
        mine = mrope_positions(ids, inputs.image_grid_thw, image_token_id=config.image_token_id, spatial_merge_size=2)
        assert torch.equal(mine, expected[:, 0])


def test_placeholders_that_do_not_match_the_images() -> None:
    config = tiny_config()
    inputs = random_inputs(config, grids=[((4, 6),)])[0]
    with pytest.raises(ValueError, match="6 image placeholders, but the images have 4"):
        mrope_positions(
            inputs.token_ids, torch.tensor([[1, 4, 4]]), image_token_id=config.image_token_id, spatial_merge_size=2
        )


def test_a_text_family_counts_tokens_and_refuses_images() -> None:
    family, ids, none = models.family("llama"), torch.tensor([5, 6, 7]), torch.zeros(0, 3, dtype=torch.int64)
    positions = family.positions(ids, none, image_token_id=-1, spatial_merge_size=1)
    assert positions.tolist() == [[0, 1, 2]] * 3
    with pytest.raises(ValueError, match="1 images for a text-only model"):
        family.positions(ids, torch.tensor([[1, 2, 2]]), image_token_id=-1, spatial_merge_size=1)
