# SPDX-License-Identifier: Apache-2.0
"""Defines a model family: everything that differs between models of different ``model_type``, and nothing else.

A family is one file: a class with the methods of ``Family``, registered by the ``model_type`` of its config.json.

    @model_family("qwen2")
    class Qwen2(DenseDecoder): ...

The file may be part of this package or a user's own. ``dense_decoder.DenseDecoder`` has what all decoders with
grouped-query attention and a gated MLP share, so that a family's file states only its differences.

A mixture of experts is such a file too, and one axis more in the layout. The file states the experts' number and
width in ``config`` and lists their weights in ``weights`` (an ``{expert}`` placeholder beside ``{layer}``, see
``weights.table``). The axis is a field of ``policy.layouts.layout.Layout``, a process group in
``policy.process_groups``, and a gather over that group in ``weights.stream`` and ``weights.load``, whose rules see
experts as they see layers of other pipeline stages: each rank holds some of them.

Shape letters: P tokens of a sequence, I images, V patches of them, F merged features of them, K deepstack levels,
h hidden size of the language model, S tokens of a packed row, b batch size, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_g2rpo import registry
from megatron_g2rpo.weights.table import WeightTable


class Family(Protocol):
    """One model family. It has no state: the function ``family`` makes a new one at every call.

    The argument ``hf_config`` of every method is transformers' configuration of the model.

    Attributes:
        vision: the family's vision tower and image processor; None for a text-only family.
    """

    vision: Vision | None

    def check(self, hf_config: Any) -> None:
        """Refuse a model of this ``model_type`` that would be computed wrongly.

        Raises:
            ValueError: the model has a feature that is not supported; names it.
        """
        ...

    def config(self, hf_config: Any) -> dict[str, Any]:
        """Return the fields of megatron-core's ``TransformerConfig`` that follow from the model alone.

        There are at least ``num_layers``, ``hidden_size``, ``ffn_hidden_size``, ``num_attention_heads``,
        ``num_query_groups`` and ``kv_channels``, by which layouts are checked as well. ``policy.config`` sets the
        fields of precision, parallelism, initialisation, recomputation and fusions.
        """
        ...

    def weights(self, hf_config: Any) -> WeightTable:
        """Return the weight table: each parameter's Megatron and Hugging Face names, and how it is sharded."""
        ...

    def angles(self, hf_config: Any) -> nn.Module:
        """Return the module that maps int64 positions ``[3, b, S]`` to float32 rotary angles ``[S, b, 1, D]``.

        The module has no parameters, and no buffers either: ``Module.bfloat16()`` would round them.
        """
        ...

    def positions(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """Return the positions of one sequence's tokens on three axes, see ``Positions``."""
        ...


class Positions(Protocol):
    """The type of ``Family.positions``: a function that gives each token of a sequence three positions."""

    def __call__(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """Return the time, height and width position of every token of one sequence, int64 ``[3, P]``.

        Args:
            token_ids: int64 ``[P]``, image placeholders expanded.
            image_grid_thw: int64 ``[I, 3]`` (time, height, width), in patches before merging.
            image_token_id: id of the image placeholder.
            spatial_merge_size: patches merged along each side.

        Raises:
            ValueError: the placeholders do not match the images.
        """
        ...


class Vision(Protocol):
    """The vision of a vision-language family: its tower, its image processor, and the tokens that stand for images.

    Attributes:
        tokens: the tokens that stand for images and frame them.
    """

    tokens: VisionTokens

    def geometry(self, hf_config: Any) -> VisionGeometry:
        """Return the sizes of the tower's input and output."""
        ...

    def tower(self, hf_config: Any, dtype: torch.dtype) -> nn.Module:
        """Build transformers' vision tower, with parameters in ``dtype`` that are not initialised."""
        ...

    def features(self, tower: nn.Module, pixels: Tensor, grids: Tensor) -> Tensor:
        """Run the tower on images.

        Args:
            tower: the module that the method ``tower`` built.
            pixels: ``[V, numbers of a patch]`` patches of all images, in the tower's dtype.
            grids: int64 ``[I, 3]``, patches of each image along time, height and width, before merging.

        Returns:
            ``[F, 1 + K, h]``, image by image: the feature that replaces a placeholder's embedding, then those that are
            added after the first K language layers (deepstack).
        """
        ...

    def image_processor(self, model_dir: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
        """Load transformers' image processor of a Hugging Face directory, in an implementation that needs no GPU.

        The processor is called with a list of PIL images and ``return_tensors="pt"``, returns ``pixel_values`` and
        ``image_grid_thw``, and has ``merge_size``, ``patch_size`` and ``temporal_patch_size``.

        Args:
            model_dir: the Hugging Face directory; nothing is downloaded.
            min_pixels, max_pixels: bounds on height x width after resizing; None for the directory's own.

        Raises:
            ValueError: the directory has no image processor or another family's, or the bounds are in the wrong order.
        """
        ...

    def block_bytes(self, hf_config: Any, patches: int, nbytes: int) -> int:
        """Return the bytes that autograd keeps of one of the tower's blocks; ``plan`` calls it.

        Args:
            hf_config: transformers' configuration of the model.
            patches: number of patches, before merging.
            nbytes: bytes of an activation's element.

        Raises:
            ValueError: the number has not been derived for this tower; ``plan`` then reports that.
        """
        ...

    def tower_bytes(self, hf_config: Any, patches: int, nbytes: int, *, recompute: bool) -> int:
        """Return the bytes that autograd keeps of the whole tower; ``plan`` calls it.

        Args:
            hf_config: transformers' configuration of the model.
            patches: number of patches, before merging.
            nbytes: bytes of an activation's element.
            recompute: whether blocks are recomputed and keep only their inputs.

        Raises:
            ValueError: see ``block_bytes``.
        """
        ...


@dataclass(frozen=True)
class VisionTokens:
    """The tokens that stand for images and videos and frame them; a policy must never sample one.

    Attributes:
        image: the placeholder of an image, repeated once per merged patch.
        video: the placeholder of a video, which is refused.
        start, end: the tokens before and after an image.
    """

    image: str
    video: str
    start: str
    end: str

    @property
    def all(self) -> tuple[str, ...]:
        """All four tokens."""
        return (self.image, self.video, self.start, self.end)


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of a vision tower's input and output.

    Attributes:
        merge: patches along each side that merge into one feature.
        levels: K, number of deepstack levels, each of which is added after one of the first language layers.
        hidden: width of a feature.
        patch_values: number of values of one patch.
    """

    merge: int
    levels: int
    hidden: int
    patch_values: int


def family(model_type: str) -> Family:
    """Return the family of a ``model_type``, as config.json names it.

    Raises:
        ValueError: the family is unknown; the message lists the known ones, and the nearest.
    """
    return registry.model_families.get(model_type)()
