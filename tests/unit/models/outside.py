# SPDX-License-Identifier: Apache-2.0
"""Two families as a user would write them, in one file outside of the package: Qwen2 (biases), and Qwen2.5-VL on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_g2rpo.extend import model_family
from megatron_g2rpo.models import VisionGeometry
from megatron_g2rpo.models.dense_decoder import DenseDecoder
from megatron_g2rpo.models.positions import mrope_positions
from megatron_g2rpo.models.qwen3_vl import Qwen3VLVision
from megatron_g2rpo.models.rotary import RotaryAngles, inverse_frequencies
from megatron_g2rpo.weights.rules import Replicated
from megatron_g2rpo.weights.table import Row


@model_family("qwen2")
class Qwen2(DenseDecoder):
    """A dense decoder whose query, key and value projections have biases."""

    def config(self, hf_config: Any) -> dict[str, Any]:
        return {**super().config(hf_config), "add_qkv_bias": True}

    def rows(self, hf_config: Any) -> list[Row]:
        rows = super().rows(hf_config)
        (qkv,) = (row for row in rows if row.megatron.endswith("linear_qkv.weight"))
        biases = tuple(name.replace(".weight", ".bias") for name in qkv.hf)
        return [*rows, Row(qkv.megatron.replace(".weight", ".bias"), biases, qkv.rule)]


class Qwen25VLVision(Qwen3VLVision):
    """A tower with windows of attention and without deepstack; tokens and image processor are Qwen3-VL's."""

    def geometry(self, hf_config: Any) -> VisionGeometry:
        vision = hf_config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return VisionGeometry(
            merge=vision.spatial_merge_size, levels=0, hidden=vision.out_hidden_size, patch_values=values
        )

    def tower(self, hf_config: Any, dtype: torch.dtype) -> nn.Module:
        with no_init_weights():
            return Qwen2_5_VisionTransformerPretrainedModel._from_config(
                hf_config.vision_config, dtype=dtype, attn_implementation="sdpa"
            )

    def features(self, tower: nn.Module, pixels: Tensor, grids: Tensor) -> Tensor:
        return tower(pixels, grid_thw=grids, return_dict=True).pooler_output[:, None]

    def block_bytes(self, hf_config: Any, patches: int, nbytes: int) -> int:
        raise ValueError("what Qwen2.5-VL's vision tower keeps has not been derived")

    def tower_bytes(self, hf_config: Any, patches: int, nbytes: int, *, recompute: bool) -> int:
        return self.block_bytes(hf_config, patches, nbytes)


@model_family("qwen2_5_vl")
class Qwen25VL(Qwen2):
    """The decoder of Qwen2 with three position rows, whose frequencies lie in chunks."""

    prefix = "model.language_model."
    vision = Qwen25VLVision()

    def rows(self, hf_config: Any) -> list[Row]:
        return [Row("vision_model.{path}", ("model.visual.{path}",), Replicated()), *super().rows(hf_config)]

    def angles(self, hf_config: Any) -> nn.Module:
        text = hf_config.get_text_config()
        section = text.rope_parameters["mrope_section"]
        return RotaryAngles(inverse_frequencies(text), [axis for axis in range(3) for _ in range(section[axis])])

    def positions(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        return mrope_positions(
            token_ids, image_grid_thw, image_token_id=image_token_id, spatial_merge_size=spatial_merge_size
        )
