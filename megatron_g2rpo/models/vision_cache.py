# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of image features, so that an image is encoded once while the vision tower's weights stay the same.

Rollout engine and policy of a process share one: they run the same tower, on weights that come from the policy.
Features are kept in host memory, under the content of the image, the version of the weights, and the dtype and device
that computed them.

Shape letters: F merged features of an image, K deepstack levels, h hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_g2rpo.models.images import Image

# encode(images): the features ``[F, 1 + K, h]`` of each image, without gradient, in the dtype and on the device that
# the cache was asked for.
Encode = Callable[[Sequence[Image]], Sequence[Tensor]]

# Name of an image, dtype of its features, device that computed them.
_Key = tuple[str, torch.dtype, str]


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
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self.version = 0
        self.num_bytes = 0
        self.patches = self.saved_patches = 0

    def weights_changed(self) -> None:
        """Forget everything: the tower has other weights now. Whoever holds the former ones may no longer ask."""
        self._kept.clear()
        self.version, self.num_bytes = self.version + 1, 0

    def begin_step(self) -> None:
        """Forget, at the begin of a step, what a run that resumes there would not know.

        Features of a tower that learns may have been computed in a validation's company; to the last bit they depend on
        it. Those of a frozen tower do not.
        """
        if not self._frozen:
            self._kept.clear()
            self.num_bytes = 0

    def features(
        self,
        images: Sequence[Image],
        encode: Encode,
        *,
        version: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Tensor]:
        """Return the features of images, of which only those are encoded that are not known, and each content once.

        Args:
            images: images.
            encode: runs the tower.
            version: number of the tower's weights that ``encode`` runs with, ``version`` as it was when they came.
            dtype: dtype of the tower and of the features.
            device: device of the tower and of the features.

        Returns:
            ``[F, 1 + K, h]`` of each image; they must not be written to.
        """
        current = version == self.version  # else these are former weights: their features are nobody else's
        found: dict[str, Tensor] = {}
        missing: dict[str, Image] = {}
        for image in images:
            kept = self._read((image.name, dtype, str(device))) if current else None
            if kept is not None:
                found[image.name] = kept.to(device)
            else:
                missing[image.name] = image
        for name, features in zip(missing, self._encoded(list(missing.values()), encode), strict=True):
            found[name] = features
            if current:
                self._keep((name, dtype, str(device)), features)
        encoded = sum(image.num_patches for image in missing.values())
        self.patches += encoded
        self.saved_patches += sum(image.num_patches for image in images) - encoded
        return [found[image.name] for image in images]

    def _encoded(self, images: Sequence[Image], encode: Encode) -> Sequence[Tensor]:
        if self._frozen:
            return [features for image in images for features in encode([image])]
        return encode(images) if images else []

    def _read(self, key: _Key) -> Tensor | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: _Key, features: Tensor) -> None:
        # A copy, also on the CPU: a view of what was encoded together would keep all of it.
        kept = features.detach().to("cpu", copy=True)
        if kept.nbytes > self._max_bytes:
            return
        self._kept[key] = kept
        self.num_bytes += kept.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
