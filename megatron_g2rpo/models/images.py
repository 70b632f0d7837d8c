# SPDX-License-Identifier: Apache-2.0
"""Images as a vision tower reads them, named by what they show: equal patches in an equal grid have one name.

Shape letters: I images, V patches of them, D numbers of a patch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Patches of model inputs or of a row -> the names of their images, for as long as the patches live.
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image as a vision tower reads it.

    Attributes:
        name: hex digest (SHA-256) of grid and patches.
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


def images_of(pixel_values: Tensor, image_grid_thw: Tensor) -> list[Image]:
    """Return the images of model inputs, or of a packed row, in their order.

    Names are computed once for as long as the tensor of patches lives; it must not be written to.

    Args:
        pixel_values: float32 ``[V, D]``, the patches of all images.
        image_grid_thw: int64 ``[I, 3]``, the patches of each along time, height and width.
    """
    pieces = pixel_values.split(image_grid_thw.prod(dim=1).tolist())
    names: list[str] | None = _names.get(pixel_values)
    if names is None or len(names) != len(image_grid_thw):
        names = [_digest(grid, pixels) for grid, pixels in zip(image_grid_thw, pieces, strict=True)]
        _names[pixel_values] = names
    return [
        Image(name=name, pixels=pixels, grid=grid)
        for name, pixels, grid in zip(names, pieces, image_grid_thw, strict=True)
    ]


def _digest(grid: Tensor, pixels: Tensor) -> str:
    digest = hashlib.sha256(grid.cpu().contiguous().numpy().tobytes())
    digest.update(pixels.cpu().contiguous().numpy().data)
    return digest.hexdigest()
