# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a vision tower that learns, kept with their graphs from generation to the update that follows.

Generation and a step's first update need the features of the same images under the same weights. The tower runs once,
with its graph. The update's rows read *leaves*: the features, cut off from the graph. After the backward passes of all
rows a leaf has the sum of the image's gradients, which goes back through the tower once. That is the chain rule, and no
approximation.

Shape letters: F merged features of an image, K deepstack levels, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_g2rpo import progress
from megatron_g2rpo.models.images import Image

# Images that are small go through the tower together: as long as they have no more patches than this.
_PATCHES_TOGETHER = 1024


class Tower(Protocol):
    """What a policy says of its vision tower.

    Attributes:
        dtype: dtype of features.
        device: device of the tower.
    """

    dtype: torch.dtype
    device: torch.device

    def encode(self, images: Sequence[Image]) -> Sequence[Tensor]:
        """Return the features ``[F, 1 + K, h]`` of each image; with a graph where gradients are enabled."""
        ...

    def graph_bytes(self, patches: int) -> int:
        """Return the bytes that the graph of a forward pass keeps, by its number of patches before merging."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A forward pass of the tower: its images, and for each the features with graph and their leaf.

    A leaf is float32, whatever the features: the gradients of the rows add up in it.
    """

    images: tuple[Image, ...]
    features: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]


class VisionGraphs:
    """Graphs of the forward passes of one step, within a bound, under one version of the tower's weights.

    They are kept between ``begin`` and ``drop``. Nothing is kept before a tower was connected.

    Args:
        max_bytes: bytes that all graphs may keep at most.

    Attributes:
        num_bytes: bytes that are kept now.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tower: Tower | None = None
        self._open = False
        self._passes: list[_Pass] = []
        self._place: dict[str, tuple[int, int]] = {}
        self._owed = False
        self.num_bytes = 0

    def connect(self, tower: Tower) -> None:
        """Take the tower whose weights learn."""
        self._tower = tower

    def begin(self) -> None:
        """Forget the former graphs, and keep those of the passes that follow."""
        self.drop()
        self._open = True

    def drop(self) -> None:
        """Forget all graphs, and keep none until ``begin``: the weights have changed, or nothing will learn from them.

        Raises:
            RuntimeError: an update read features whose gradient was never taken.
        """
        owed = self._owed
        self._forget_gradients()
        self._passes.clear()
        self._place.clear()
        self._open, self.num_bytes = False, 0
        if owed:
            raise RuntimeError("an update read kept image features, but their gradient never went through the tower")

    def serves(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether features of this dtype and device can be had here now."""
        tower = self._tower
        return self._open and tower is not None and (tower.dtype, tower.device) == (dtype, device)

    def features(
        self, images: Sequence[Image], encode: Callable[[Sequence[Image]], Sequence[Tensor]], *, keep: bool
    ) -> list[Tensor]:
        """Return the features of images without graph, in order.

        Args:
            images: images of different content.
            encode: runs the tower without a graph, on those for which there is none.
            keep: whether images that are new here are encoded with a graph, as long as there is room.
        """
        assert self._tower is not None
        new = [image for image in images if image.name not in self._place]
        for group in _groups(new) if keep else ():
            size = self._tower.graph_bytes(sum(image.num_patches for image in group))
            if self.num_bytes + size <= self._max_bytes:
                self._keep(group, self._tower, size)
        rest = [image for image in images if image.name not in self._place]
        encoded = iter(encode(rest) if rest else ())
        return [found if (found := self._kept(image)) is not None else next(encoded) for image in images]

    def leaf(self, image: Image) -> Tensor | None:
        """Return an image's features for a row of an update, in the tower's dtype, or None: there is no graph of it.

        Whoever reads leaves calls ``backward`` once the rows have run theirs.
        """
        place = self._place.get(image.name)
        if place is None:
            return None
        assert self._tower is not None
        self._owed = True
        return self._passes[place[0]].leaves[place[1]].to(self._tower.dtype)

    def backward(self) -> list[Image]:
        """Take the gradients of the leaves through the tower, and forget them; graphs stay.

        Returns:
            The images whose pass went backward.
        """
        learnt: list[Image] = []
        for each in self._passes:
            if all(leaf.grad is None for leaf in each.leaves):
                continue  # of another minibatch, or of a prompt that was left out
            pairs = [
                (features, leaf.grad.to(features.dtype))
                for features, leaf in zip(each.features, each.leaves, strict=True)
                if leaf.grad is not None
            ]
            # Kept: the gradient of each task, a diagnostic, comes before that of the update.
            torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs], retain_graph=True)
            learnt += each.images
            progress.advance()
        self._forget_gradients()
        return learnt

    def _forget_gradients(self) -> None:
        self._owed = False
        for each in self._passes:
            for leaf in each.leaves:
                leaf.grad = None

    def _keep(self, images: Sequence[Image], tower: Tower, size: int) -> None:
        with torch.enable_grad():
            features = tuple(tower.encode(images))
        leaves = tuple(each.detach().float().requires_grad_() for each in features)
        for number, image in enumerate(images):
            self._place[image.name] = (len(self._passes), number)
        self._passes.append(_Pass(images=tuple(images), features=features, leaves=leaves))
        self.num_bytes += size
        progress.advance()

    def _kept(self, image: Image) -> Tensor | None:
        place = self._place.get(image.name)
        return None if place is None else self._passes[place[0]].features[place[1]].detach()


def _groups(images: Sequence[Image]) -> list[list[Image]]:
    """Return images in the groups that go through the tower together, in order."""
    groups: list[list[Image]] = []
    for image in images:
        if groups and sum(each.num_patches for each in groups[-1]) + image.num_patches <= _PATCHES_TOGETHER:
            groups[-1].append(image)
        else:
            groups.append([image])
    return groups
