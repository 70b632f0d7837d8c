# SPDX-License-Identifier: Apache-2.0
"""The images of a prompt, named by what they show: equal pixels in an equal grid have one name, in whatever prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from megatron_g2rpo.types import ModelInputs


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image as a vision tower reads it.

    Attributes:
        name: hex digest of grid and pixels.
        pixels: float32 ``[V, D]``, its patches.
        grid: int64 ``[3]`` (time, height, width), in patches before merging.
    """

    name: str
    pixels: Tensor = field(repr=False)
    grid: Tensor

    @property
    def num_patches(self) -> int:
        """Number of patches, before merging."""
        return len(self.pixels)


def images_of(inputs: ModelInputs) -> list[Image]:
    """Return the images of a prompt, in its order. Its pixels must be those that its grids ask for."""
    sizes = inputs.image_grid_thw.prod(-1).tolist()
    return [
        Image(name=_digest(grid, pixels), pixels=pixels, grid=grid)
        for grid, pixels in zip(inputs.image_grid_thw, inputs.pixel_values.split(sizes), strict=True)
    ]


def _digest(grid: Tensor, pixels: Tensor) -> str:
    digest = hashlib.sha256(grid.contiguous().numpy().tobytes())
    digest.update(pixels.contiguous().numpy().data)
    return digest.hexdigest()
