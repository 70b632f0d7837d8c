# SPDX-License-Identifier: Apache-2.0
"""Claim: what models/qwen3_vl_tower.py takes of transformers' Qwen3-VL tower is there.

A tower that computed positions itself, or split the row by image, would be slower and say nothing; one that handed over
less than the row would be wrong.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AttentionInterface, vision_utils
from transformers.models.qwen3_vl import modeling_qwen3_vl

from megatron_g2rpo.models import qwen3_vl_tower
from megatron_g2rpo.models.qwen3_vl import Qwen3VLVision
from tests.common.tiny_model import make_tiny_qwen3vl

GRIDS = torch.tensor([[1, 4, 6], [2, 2, 4]])
PIXELS = torch.zeros(40, 3 * 2 * 8 * 8)


@pytest.fixture
def tower() -> Any:
    config, model = make_tiny_qwen3vl()
    tower = Qwen3VLVision().tower(config, torch.float32)
    tower.load_state_dict(model.model.visual.state_dict())
    return tower


def test_names_of_parameters_are_transformers_own(tower: Any) -> None:
    _, model = make_tiny_qwen3vl()
    theirs = model.model.visual.state_dict()
    assert {name: value.shape for name, value in tower.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }


def test_the_patch_embedding_is_a_convolution_of_whole_patches() -> None:
    _, model = make_tiny_qwen3vl()
    convolution: Any = model.model.visual.patch_embed.proj
    assert isinstance(convolution, torch.nn.Conv3d)
    assert convolution.kernel_size == convolution.stride
    assert not any(convolution.padding)
    assert convolution.groups == 1


def test_a_block_hands_over_the_whole_row_and_its_runs(tower: Any) -> None:
    seen: list[tuple[torch.Size, Any]] = []

    def watching(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **keywords: Any) -> Any:
        seen.append((query.shape, keywords["runs"]))
        return qwen3_vl_tower.attention(module, query, key, value, mask or keywords.pop("attention_mask"), **keywords)

    assert AttentionInterface()[qwen3_vl_tower.ATTENTION] is qwen3_vl_tower.attention
    AttentionInterface.register(qwen3_vl_tower.ATTENTION, watching)
    try:
        qwen3_vl_tower.encode(tower, PIXELS, GRIDS)
    finally:
        AttentionInterface.register(qwen3_vl_tower.ATTENTION, qwen3_vl_tower.attention)
    assert seen == [(torch.Size([1, 2, 40, 16]), ((1, 24), (2, 8)))] * len(tower.blocks)


def test_positions_computed_ahead_are_taken(tower: Any) -> None:
    """Each function of ``vision_utils`` that the tower calls returns the tensor that it is given."""
    returned: dict[str, list[bool]] = {}

    def watched(name: str, keys: tuple[str, ...]) -> Any:
        function = getattr(vision_utils, name)

        def call(*arguments: Any, kwargs: dict[str, Any], **keywords: Any) -> Any:
            given = [kwargs[key] for key in keys]
            result = function(*arguments, kwargs=kwargs, **keywords)
            results = result if isinstance(result, tuple) else (result,)
            returned[name] = [mine is theirs for mine, theirs in zip(given, results, strict=False)]
            assert not set(keys) & set(kwargs)
            return result

        return patch.object(modeling_qwen3_vl, name, call)

    with (
        watched("get_vision_interpolation_indices_and_weights", ("interp_indices", "interp_weights")),
        watched("get_vision_position_ids", ("position_ids",)),
        watched("get_vision_attention_seqlens", ("cu_seqlens",)),
    ):
        qwen3_vl_tower.encode(tower, PIXELS, GRIDS)
    assert returned == {
        "get_vision_interpolation_indices_and_weights": [True, True],
        "get_vision_position_ids": [True],
        "get_vision_attention_seqlens": [True],
    }
