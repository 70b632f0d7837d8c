# SPDX-License-Identifier: Apache-2.0
"""Model inputs turned back into pictures, to see what the model sees."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.types import ModelInputs


def pictures_of(inputs: ModelInputs, processor: ChatProcessor) -> list[Image.Image]:
    """Return the images of a prompt as the model gets them: resized, cut into patches, and joined again.

    Args:
        inputs: model inputs of a prompt.
        processor: what encoded them.
    """
    if processor.image_processor is None:
        return []
    sizes = inputs.image_grid_thw.prod(-1).tolist()
    rows = inputs.pixel_values.split(sizes)
    return [
        _picture(patches, grid.tolist(), processor) for patches, grid in zip(rows, inputs.image_grid_thw, strict=True)
    ]


def _picture(patches: Tensor, grid: list[int], processor: ChatProcessor) -> Image.Image:
    """Undo the image processor's patches ``[V, D]`` of one image, its first frame alone.

    Its patches are ordered (frame, block row, block column, row in the block, column in the block), a block being what
    merges into one token, and hold (channel, repeated frame, y, x).
    """
    maker = processor.image_processor
    frames, rows, columns = grid
    merge, side, time = maker.merge_size, maker.patch_size, maker.temporal_patch_size
    cut = patches.reshape(frames, rows // merge, columns // merge, merge, merge, 3, time, side, side)
    # frame, block row, row in it, y, block column, column in it, x, channel
    image = cut[:, :, :, :, :, :, 0].permute(0, 1, 3, 6, 2, 4, 7, 5)[0].reshape(rows * side, columns * side, 3).numpy()
    scaled = image * np.array(maker.image_std) + np.array(maker.image_mean)
    return Image.fromarray((scaled / maker.rescale_factor).round().clip(0, 255).astype(np.uint8))
