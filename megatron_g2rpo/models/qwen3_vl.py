# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, dense: a Qwen3 decoder with three position axes, behind a vision tower with deepstack.

Shape letters: V patches (four of them make a merged token), v hidden size of the tower, e bytes of an element.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_g2rpo import registry
from megatron_g2rpo.models.base import VisionGeometry, VisionTokens
from megatron_g2rpo.models.dense_decoder import DenseDecoder
from megatron_g2rpo.models.positions import mrope_positions
from megatron_g2rpo.models.rotary import RotaryAngles, interleaved_axes, inverse_frequencies
from megatron_g2rpo.weights.model_files import IMAGE_PROCESSOR, PROCESSOR, image_processor_config
from megatron_g2rpo.weights.rules import Replicated
from megatron_g2rpo.weights.table import Row

# One processor under many names: of three generations of Qwen, and of transformers' implementations.
_PROCESSOR_TYPES = re.compile(r"Qwen(2|2_5_|3)VLImageProcessor(Fast|Pil)?")
_FP32, _INT64 = torch.float32.itemsize, torch.int64.itemsize


class Qwen3VLVision:
    """The vision of Qwen3-VL: transformers' ``Qwen3VLVisionModel`` as ``qwen3_vl_tower`` runs it; its PIL processor."""

    tokens = VisionTokens(image="<|image_pad|>", video="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>")

    def geometry(self, hf_config: Any) -> VisionGeometry:
        """Return the sizes of the tower's input and output; see ``Vision.geometry``."""
        vision = hf_config.vision_config
        return VisionGeometry(
            merge=vision.spatial_merge_size,
            levels=len(vision.deepstack_visual_indexes),
            hidden=vision.out_hidden_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        )

    def tower(self, hf_config: Any, dtype: torch.dtype) -> nn.Module:
        """Build the vision tower; see ``Vision.tower``."""
        from megatron_g2rpo.models.qwen3_vl_tower import build

        return build(hf_config.vision_config, dtype)

    def features(self, tower: nn.Module, pixels: Tensor, grids: Tensor) -> Tensor:
        """Run the tower on images; see ``Vision.features``."""
        from megatron_g2rpo.models.qwen3_vl_tower import encode

        return encode(tower, pixels, grids)

    def image_processor(self, model_dir: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
        """Load the PIL image processor; see ``Vision.image_processor``.

        ``AutoImageProcessor`` would pick the torchvision implementation where torchvision can be imported and the PIL
        one elsewhere, and their resized pixels differ. The class is named here so that one recipe reads the same pixels
        on every machine.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        found = image_processor_config(model_dir)
        if found is None:
            raise ValueError(
                f"{model_dir} has neither {IMAGE_PROCESSOR} nor a {PROCESSOR} with an image_processor, but the model "
                "sees images: copy it from the model that this one was made of"
            )
        path, config = found
        kind = config.get("image_processor_type", "")
        if not _PROCESSOR_TYPES.fullmatch(kind):
            raise ValueError(
                f"{path}: image_processor_type is {kind!r}; Qwen3-VL's is Qwen2VLImageProcessor, also called "
                "Qwen3VLImageProcessor or ...Fast"
            )
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        given: dict[str, Any] = {key: value for key, value in bounds.items() if value is not None}
        processor = Qwen2VLImageProcessorPil.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False, **given
        )
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        if not 0 < low <= high:
            raise ValueError(f"pixel bounds {low} to {high} are not in order; mind data.min_pixels and data.max_pixels")
        return processor

    # -- memory, for plan; docs/plan.md derives the lines -------------------------------------------------------------

    def block_bytes(self, hf_config: Any, patches: int, nbytes: int) -> int:
        """Return the bytes that autograd keeps of one block; see ``Vision.block_bytes``.

        It keeps, in hidden widths, norm inputs and outputs (4), queries, keys and values by head (3), the attention's
        output and, by patch, the output projection's input (2); and in MLP widths the MLP's two linears (2).
        """
        vision = hf_config.vision_config
        wide = nbytes * patches * (9 * vision.hidden_size + 2 * vision.intermediate_size)
        return wide + patches * (2 * _statistics(nbytes) + _FP32 * vision.num_heads)

    def tower_bytes(self, hf_config: Any, patches: int, nbytes: int, *, recompute: bool) -> int:
        """Return the bytes that autograd keeps of the whole tower; see ``Vision.tower_bytes``."""
        if not patches:
            return 0
        vision, geometry = hf_config.vision_config, self.geometry(hf_config)
        e, width, levels, statistics = nbytes, vision.hidden_size, geometry.levels, _statistics(nbytes)
        merged = patches // geometry.merge**2
        # The norm's output, the first linear's output, the second's input; merged, four patches are one vector of
        # fourfold width.
        merger = 3 * e * patches * width
        of_block = e * patches * width if recompute else self.block_bytes(hf_config, patches, nbytes)
        kept = vision.depth * of_block + (levels + 1) * merger + levels * merged * statistics
        kept += e * patches * width + patches * statistics  # the last block's output, which the merger's norm keeps
        kept += e * patches * geometry.patch_values
        # Cosines and sines of the rotary embedding; places and weights of the four position embeddings of a patch.
        return kept + 2 * _FP32 * patches * (width // vision.num_heads) + patches * 4 * (_INT64 + _FP32)


def _statistics(nbytes: int) -> int:
    """Return the bytes of the mean and reciprocal deviation that a layer norm keeps of one vector."""
    return 2 * nbytes


@registry.model_families.register("qwen3_vl")
class Qwen3VL(DenseDecoder):
    """Qwen3-VL: the decoder of Qwen3 behind a vision tower, whose weights are not sharded."""

    head_norms = True
    prefix = "model.language_model."
    vision = Qwen3VLVision()

    def config(self, hf_config: Any) -> dict[str, Any]:
        """Return the fields of ``TransformerConfig`` that follow from the model; see ``Family.config``."""
        section = hf_config.get_text_config().rope_parameters["mrope_section"]
        return {**super().config(hf_config), "mrope_section": list(section)}

    def rows(self, hf_config: Any) -> list[Row]:
        """Return the rows of the weight table: the vision tower's, then the language model's."""
        return [Row("vision_model.{path}", ("model.visual.{path}",), Replicated()), *super().rows(hf_config)]

    def angles(self, hf_config: Any) -> nn.Module:
        """Return the rotary angles of three interleaved position axes; see ``Family.angles``."""
        text = hf_config.get_text_config()
        return RotaryAngles(inverse_frequencies(text), interleaved_axes(text.rope_parameters["mrope_section"]))

    def positions(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """Return the multimodal positions (mRoPE) of one sequence; see ``Positions``."""
        return mrope_positions(
            token_ids, image_grid_thw, image_token_id=image_token_id, spatial_merge_size=spatial_merge_size
        )
