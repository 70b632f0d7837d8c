# SPDX-License-Identifier: Apache-2.0
"""Encodes each distinct image of a row once, on one of the ranks that need it.

Tensor- and context-parallel peers work on the same row. Each runs the (replicated) vision tower on a share of the row's
images; all of them then gather the features. Where no gradient is asked for, a rank reads those of its share that it
knows from its cache (``models.vision_cache``), which changes what it computes and not what its peers wait for.

The gradient: every peer has a gradient for every feature. Over context-parallel peers these are parts of a sum (each
saw its own tokens); over the T tensor-parallel peers they are equal. The gather's backward, a
reduce-scatter over all of them, thus gives the owner T times the whole gradient, and the tower's parameter gradients
come out T times too large *on the one peer that encoded the image* and zero on the others: their average over
tensor-parallel peers (``average_gradients_across_tp_domain``) and their sum over context- and data-parallel ranks
(megatron-core's DDP) are exact.

Shape letters: I images, V patches of them, D numbers of a patch, F merged features, K deepstack levels, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_g2rpo.models import Vision, VisionGeometry
from megatron_g2rpo.models.images import Image, images_of
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.models.vision_graphs import VisionGraphs
from megatron_g2rpo.policy.layouts.image_shares import assign_images


@dataclass(frozen=True)
class ImageFeatures:
    """The vision tower's features of a row's images, equal on all peers.

    Attributes:
        values: ``[*, 1 + K, h]``, the merged features and their deepstack levels, in the order of the gather.
        places: int64 ``[F]``, index in ``values`` of the row's f-th feature.
    """

    values: Tensor
    places: Tensor

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the row's features with the given numbers: ``[len(index), 1 + K, h]``."""
        return self.values.index_select(0, self.places[index])


@dataclass
class VisionWork:
    """What this rank's tower did, in patches before merging; it adds up.

    Attributes:
        encoded: patches of forward passes.
        encoded_pairs: pairs of patches that saw each other in them: those of an image.
        learnt: of the patches, those that a backward pass follows.
        learnt_pairs: of the pairs, those that a backward pass follows.
        known: patches of this rank's share that were read from the cache.
        repeated: patches of images whose content occurs before in the row; the first of the peers counts them.
    """

    encoded: int = 0
    encoded_pairs: int = 0
    learnt: int = 0
    learnt_pairs: int = 0
    known: int = 0
    repeated: int = 0

    def count(self, sizes: Sequence[int], *, learns: bool) -> None:
        """Add a forward pass over images of these sizes in patches."""
        patches, pairs = sum(sizes), sum(size**2 for size in sizes)
        self.encoded += patches
        self.encoded_pairs += pairs
        self.learnt += patches * learns
        self.learnt_pairs += pairs * learns


class VisionEncoder:
    """Runs the vision tower on this rank's share of a row's images. It has no parameters: the tower is the model's.

    Args:
        vision: the model family's vision, which knows how to run the tower.
        tower: the vision tower.
        geometry: sizes of the tower's input and output.
        dtype: dtype of pixels and features.
        device: the tower's device.
        group: process group of the peers that share a row (tensor x context parallel).
        cache: features of images that were encoded before; None: every row's images are encoded anew, and images of
            equal content are not found.
        every_row: run the tower on a row without images as well (on a small dummy image whose features count 0 times),
            so that each of its parameters has a gradient: megatron-core's overlapped gradient reduction waits for all.
        graph_bytes: bytes that the graph of a forward pass keeps, by its number of patches; None: graphs are not kept.
    """

    def __init__(
        self,
        vision: Vision,
        tower: nn.Module,
        geometry: VisionGeometry,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
        *,
        cache: VisionCache | None = None,
        every_row: bool,
        graph_bytes: Callable[[int], int] | None = None,
    ) -> None:
        self._cache, self.work = cache, VisionWork()
        self._vision, self._tower, self._geometry = vision, tower, geometry
        self.dtype, self.device, self._group, self._every_row = dtype, device, group, every_row
        self._graph_bytes = graph_bytes
        self._graphs = None if cache is None else cache.graphs
        if self._graphs is not None:
            if group.size() > 1 or every_row:
                raise ValueError(
                    "graphs of image features are kept by a rank that has its rows to itself, without overlapped "
                    "gradient reduction; see recipe.vision_graphs"
                )
            if self._has_known_size():
                self._graphs.connect(self)

    def _has_known_size(self) -> bool:
        """Return whether the family says what a graph keeps: without, none are kept, because of the bound."""
        if self._graph_bytes is None:
            return False
        try:
            self.graph_bytes(self._geometry.merge**2)
        except ValueError:
            return False
        return True

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor) -> ImageFeatures | None:
        """Encode all images of the row. A collective of the peers.

        Args:
            pixel_values: float32 ``[V, D]`` patches of all images, on any device: only this rank's share is moved.
            image_grid_thw: int64 ``[I, 3]``, patches of each image along time, height and width.

        Returns:
            The features of all images; None for a row without images unless ``every_row``.
        """
        if not len(image_grid_thw) and not self._every_row:
            return None
        images = self._images(pixel_values, image_grid_thw.cpu())
        distinct, number = _distinct(images) if self._cache is not None else (images, list(range(len(images))))
        sizes = [image.num_patches // self._geometry.merge**2 for image in distinct]
        shares = assign_images(sizes, self._group.size())
        if self._group.rank() == 0:  # the peers would count it again
            self.work.repeated += _patches(images) - _patches(distinct)
        features = self._encode([distinct[image] for image in shares[self._group.rank()]])
        if self._group.size() == 1:
            return ImageFeatures(features, _places(sizes, shares, 0, number).to(self.device))
        longest = max(1, *(sum(sizes[image] for image in share) for share in shares))
        padded = F.pad(features, (0, 0, 0, 0, 0, longest - len(features)))
        values = gather_from_sequence_parallel_region(
            input_=padded, tensor_parallel_output_grad=True, group=self._group
        )
        return ImageFeatures(values, _places(sizes, shares, longest, number).to(self.device))

    def _images(self, pixel_values: Tensor, grids: Tensor) -> list[Image]:
        if self._cache is not None:
            return images_of(pixel_values, grids)
        pieces = pixel_values.split(grids.prod(dim=1).tolist())
        return [Image(name="", pixels=pixels, grid=grid) for pixels, grid in zip(pieces, grids, strict=True)]

    def _encode(self, mine: list[Image]) -> Tensor:
        """Return the features of this rank's share of a row's images."""
        if not mine:
            return self._nothing()
        if self._learns and self._graphs is not None:
            return self._from_leaves(mine, self._graphs)
        if self._cache is None or self._learns:
            return self._run(mine)
        before = self.work.encoded
        features = self._cache.features(
            mine, self._run_each, version=self._cache.version, dtype=self.dtype, device=self.device
        )
        self.work.known += _patches(mine) - (self.work.encoded - before)
        return torch.cat(features)

    def _from_leaves(self, images: list[Image], graphs: VisionGraphs) -> Tensor:
        """Return features for an update's row: leaves of kept graphs, and of other images a pass with its graph."""
        leaves = [graphs.leaf(image) for image in images]
        rest = [image for image, leaf in zip(images, leaves, strict=True) if leaf is None]
        if len(rest) == len(images):
            return self._run(images)
        self.work.known += _patches(images) - _patches(rest)
        anew = iter(self._run_each(rest) if rest else ())
        return torch.cat([next(anew) if leaf is None else leaf for leaf in leaves])

    def graph_bytes(self, patches: int) -> int:
        """Return the bytes that the graph of a forward pass keeps; see ``vision_graphs.Tower``."""
        assert self._graph_bytes is not None, "graphs are not kept"
        return self._graph_bytes(patches)

    def encode(self, images: Sequence[Image]) -> Sequence[Tensor]:
        """Return the features of each image for a graph that is kept; see ``vision_graphs.Tower``.

        The forward pass is work of generation, which counts it; the backward pass is counted by ``finish_backward``.
        """
        return self._split(self._features(images), images)

    def encode_ahead(self, images: Sequence[Image]) -> None:
        """Leave the cache as if the embedded engine had asked it for images, which are encoded together if unknown."""
        if self._cache is not None:
            with torch.no_grad():
                self._cache.features(
                    images,
                    self.encode,
                    version=self._cache.version,
                    dtype=self.dtype,
                    device=self.device,
                    keep_graphs=True,
                )

    def finish_backward(self) -> None:
        """Take the gradients of kept features through the tower, after the backward passes of all rows."""
        if self._graphs is not None:
            learnt = self._graphs.backward()
            self.work.learnt += _patches(learnt)
            self.work.learnt_pairs += sum(image.num_patches**2 for image in learnt)

    @property
    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._tower.parameters())

    def _run(self, images: Sequence[Image]) -> Tensor:
        self.work.count([image.num_patches for image in images], learns=self._learns)
        return self._features(images)

    def _features(self, images: Sequence[Image]) -> Tensor:
        pixels = torch.cat([image.pixels for image in images]).to(self.device, self.dtype)
        grids = torch.stack([image.grid for image in images]).to(self.device)
        return self._vision.features(self._tower, pixels, grids).to(self.dtype)

    def _run_each(self, images: Sequence[Image]) -> Sequence[Tensor]:
        return self._split(self._run(images), images)

    def _split(self, features: Tensor, images: Sequence[Image]) -> Sequence[Tensor]:
        return features.split([image.num_patches // self._geometry.merge**2 for image in images])

    def _nothing(self) -> Tensor:
        """Return zero features that are in the graph if the tower learns: its peers wait in the gather's backward."""
        if self._every_row:
            side = self._geometry.merge
            pixels = torch.zeros(side * side, self._geometry.patch_values)
            return self._run([Image(name="", pixels=pixels, grid=torch.tensor([1, side, side]))])[:0]
        empty = torch.empty(0, 1 + self._geometry.levels, self._geometry.hidden, dtype=self.dtype, device=self.device)
        return empty.requires_grad_(self._learns)


def _distinct(images: Sequence[Image]) -> tuple[list[Image], list[int]]:
    """Return the images of different content, and for each image the number of its content among them."""
    distinct = {image.name: image for image in reversed(images)}
    order = list(dict.fromkeys(image.name for image in images))
    return [distinct[name] for name in order], [order.index(image.name) for image in images]


def _patches(images: Sequence[Image]) -> int:
    return sum(image.num_patches for image in images)


def _places(sizes: list[int], shares: list[list[int]], longest: int, number: list[int]) -> Tensor:
    """Return where the gather puts each feature of the row, image by image.

    Args:
        sizes: features of each distinct image.
        shares: which distinct images each peer encodes.
        longest: features that the gather takes of each peer.
        number: number of the distinct image that each image of the row is.
    """
    first = {}
    for peer, share in enumerate(shares):
        used = peer * longest
        for image in share:
            first[image] = used
            used += sizes[image]
    pieces = [torch.arange(sizes[image]) + first[image] for image in number]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
