# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of image features, so that an image is encoded once while the vision tower's weights stay the same.

Rollout engine and policy of a process share one: they run the same tower, on weights that come from the policy.
Features are kept in host memory, under the content of the image, the version of the weights, and the dtype and device
that computed them.

Shape letters: I images, V patches of them, D numbers of a patch, F merged features, K deepstack levels, h hidden size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# encode(pixels, grids): the features ``[F, 1 + K, h]`` of images, image by image, from their patches ``[V, D]`` and
# grids int64 ``[I, 3]``.
Encode = Callable[[Tensor, Tensor], Tensor]

_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image as the vision tower gets it.

    Attributes:
        pixels: float32 ``[V, D]``, its patches.
        grid: int64 ``[3]`` (time, height, width), in patches.
        digest: SHA-256 of both.
    """

    pixels: Tensor
    grid: Tensor
    digest: bytes


def images_of(pixel_values: Tensor, image_grid_thw: Tensor) -> list[Image]:
    """The images of model inputs, or of a packed row.

    Digests are computed once for as long as the tensor of patches lives; it must not be written to.

    Args:
        pixel_values: float32 ``[V, D]``, the patches of all images, on the CPU.
        image_grid_thw: int64 ``[I, 3]``, the patches of each along time, height and width, on the CPU.
    """
    pieces = pixel_values.split(image_grid_thw.prod(dim=1).tolist())
    known: list[bytes] | None = _digests.get(pixel_values)
    if known is None or len(known) != len(image_grid_thw):
        known = [_digest(grid, pixels) for grid, pixels in zip(image_grid_thw, pieces, strict=True)]
        _digests[pixel_values] = known
    return [
        Image(pixels=pixels, grid=grid, digest=digest)
        for pixels, grid, digest in zip(pieces, image_grid_thw, known, strict=True)
    ]


def _digest(grid: Tensor, pixels: Tensor) -> bytes:
    digest = hashlib.sha256(grid.contiguous().numpy().data)
    digest.update(pixels.contiguous().numpy().data)
    return digest.digest()


class VisionCache:
    """Features of images under one version of the tower's weights, within a bound; the least recently used leave.

    Args:
        max_bytes: bytes of features that are kept at most.
        frozen: whether the tower never learns. Its features then outlive steps and checkpoints, so that images are
            encoded one by one: an image's features, to the last bit, do not depend on which others are encoded with
            it, and a resumed run, which begins with an empty cache, computes what the whole run read.

    Attributes:
        version: number of the weights; it changes with them.
        num_bytes: bytes that are kept now.
        patches: patches that were encoded through the cache.
        saved_patches: patches that were asked for and needed no encoding.
    """

    def __init__(self, max_bytes: int, *, frozen: bool) -> None:
        self._max_bytes, self._frozen = max_bytes, frozen
        self._kept: OrderedDict[tuple[bytes, torch.dtype, str], Tensor] = OrderedDict()
        self.version = 0
        self.num_bytes = 0
        self.patches = self.saved_patches = 0

    def weights_changed(self) -> None:
        """Forget everything: the tower has other weights now. Whoever holds the former ones may no longer ask."""
        self._kept.clear()
        self.version, self.num_bytes = self.version + 1, 0

    def features(
        self,
        images: Sequence[Image],
        encode: Encode,
        *,
        version: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return the features of images, of which only those are encoded that are not known, and each content once.

        Args:
            images: at least one image.
            encode: runs the tower, without gradient, on patches and grids that are still on the CPU.
            version: number of the tower's weights that ``encode`` runs with, ``version`` as it was when they came.
            dtype: dtype of the tower and of the features.
            device: device of the tower and of the result.

        Returns:
            ``[F, 1 + K, h]``, image by image.
        """
        current = version == self.version  # else these are former weights: their features are nobody else's
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, Image] = {}
        for image in images:
            kept = self._read((image.digest, dtype, str(device))) if current else None
            if kept is not None:
                found[image.digest] = kept.to(device)
            elif image.digest not in found:
                missing[image.digest] = image
        for digest, features in self._encoded(list(missing.values()), encode):
            found[digest] = features
            if current:
                self._keep((digest, dtype, str(device)), features)
        encoded = sum(len(image.pixels) for image in missing.values())
        self.patches += encoded
        self.saved_patches += sum(len(image.pixels) for image in images) - encoded
        return torch.cat([found[image.digest] for image in images])

    def _encoded(self, images: Sequence[Image], encode: Encode) -> list[tuple[bytes, Tensor]]:
        if not images:
            return []
        if self._frozen:
            return [(image.digest, encode(image.pixels, image.grid[None])) for image in images]
        patches = [len(image.pixels) for image in images]
        everything = encode(
            torch.cat([image.pixels for image in images]), torch.stack([image.grid for image in images])
        )
        merged = sum(patches) // len(everything)  # patches of a feature
        pieces = everything.split([count // merged for count in patches])
        return [(image.digest, piece) for image, piece in zip(images, pieces, strict=True)]

    def _read(self, key: tuple[bytes, torch.dtype, str]) -> Tensor | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: tuple[bytes, torch.dtype, str], features: Tensor) -> None:
        # A copy, also on the CPU: a view of what was encoded together would keep all of it.
        kept = features.detach().to("cpu", copy=True)
        if kept.nbytes > self._max_bytes:
            return
        self._kept[key] = kept
        self.num_bytes += kept.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
