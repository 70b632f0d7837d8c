# SPDX-License-Identifier: Apache-2.0
"""What a model family is: everything that differs between models of different ``model_type``, and nothing else.

A family is one file: a class with the methods of ``Family``, registered by the ``model_type`` of its config.json.

    @model_family("qwen2")
    class Qwen2(DenseDecoder): ...

It may stand in this package or in a file of a user's own. ``dense_decoder.DenseDecoder`` has what all decoders with
grouped-query attention and a gated MLP share, so that a family states its differences alone.

A mixture of experts is such a file too, and one axis more in the layout. The file says the number of experts and their
width in ``config`` and lists their weights in ``weights`` (an ``{expert}`` placeholder beside ``{layer}``, see
``weights.table``). The axis is a field of ``policy.layouts.layout.Layout``, a process group in
``policy.process_groups``, and a gather over that group in ``weights.stream`` and ``weights.load``, whose rules see
experts as they see layers of other pipeline stages: each rank holds some of them.

Shape letters: P tokens of a sequence, I images, V patches of them, F merged features of them, K deepstack levels,
h hidden size of the language model, S tokens of a row, b rows, D head dimension.
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
    """One model family. It has no state: ``family`` makes one whenever it is asked for.

    ``hf_config`` is transformers' configuration of the model everywhere.

    Attributes:
        vision: what the family sees with; None for a text-only family.
    """

    vision: Vision | None

    def check(self, hf_config: Any) -> None:
        """Refuse a model of this ``model_type`` that would be computed wrongly.

        Raises:
            ValueError: names what is not supported.
        """
        ...

    def config(self, hf_config: Any) -> dict[str, Any]:
        """The fields of megatron-core's ``TransformerConfig`` that follow from the model alone.

        At least ``num_layers``, ``hidden_size``, ``ffn_hidden_size``, ``num_attention_heads``, ``num_query_groups`` and
        ``kv_channels``, from which layouts are checked as well. Fields of precision, parallelism, initialisation,
        recomputation and fusions are ``policy.config``'s.
        """
        ...

    def weights(self, hf_config: Any) -> WeightTable:
        """The names of the parameters, Megatron's and Hugging Face's, and how each is sharded."""
        ...

    def angles(self, hf_config: Any) -> nn.Module:
        """The rotary embedding: int64 positions ``[3, b, S]`` to float32 angles ``[S, b, 1, D]``.

        It has no parameters, and no buffers either: ``Module.bfloat16()`` would round them.
        """
        ...

    def positions(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """The three position rows of one sequence, see ``Positions``."""
        ...


class Positions(Protocol):
    """``Family.positions`` as a function: time, height and width position of every token of one sequence."""

    def __call__(
        self, token_ids: Tensor, image_grid_thw: Tensor, *, image_token_id: int, spatial_merge_size: int
    ) -> Tensor:
        """Compute int64 ``[3, P]``.

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
    """What a family sees with: the tower and its features, and how text refers to images.

    Attributes:
        tokens: the tokens that stand for images.
    """

    tokens: VisionTokens

    def geometry(self, hf_config: Any) -> VisionGeometry:
        """Sizes of the tower's input and output."""
        ...

    def tower(self, hf_config: Any, dtype: torch.dtype) -> nn.Module:
        """Transformers' vision tower, with parameters in ``dtype`` that are not initialised."""
        ...

    def features(self, tower: nn.Module, pixels: Tensor, grids: Tensor) -> Tensor:
        """Run the tower.

        Args:
            tower: see ``tower``.
            pixels: ``[V, D]`` of all images, in the tower's dtype.
            grids: int64 ``[I, 3]``, patches of each image before merging.

        Returns:
            ``[F, 1 + K, h]``: the feature that replaces a placeholder's embedding, then those that are added after the
            first K language layers (deepstack). Image by image.
        """
        ...

    def image_processor(self, model_dir: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
        """Transformers' image processor of a Hugging Face directory, in an implementation that does not need a GPU.

        It is called with a list of PIL images and ``return_tensors="pt"``, gives ``pixel_values`` and
        ``image_grid_thw``, and has ``merge_size``, ``patch_size`` and ``temporal_patch_size``.

        Args:
            model_dir: the directory; nothing is downloaded.
            min_pixels, max_pixels: bounds on height x width after resizing; None for the directory's own.

        Raises:
            ValueError: the directory has none, or another family's, or the bounds are in the wrong order.
        """
        ...

    def block_bytes(self, hf_config: Any, patches: int, nbytes: int) -> int:
        """Bytes that autograd keeps of one of the tower's blocks, for ``plan``.

        Args:
            hf_config: the model's.
            patches: number of patches, before merging.
            nbytes: bytes of an activation's element.

        Raises:
            ValueError: nobody has derived it for this tower; a plan then says so.
        """
        ...

    def tower_bytes(self, hf_config: Any, patches: int, nbytes: int, *, recompute: bool) -> int:
        """Bytes that autograd keeps of the whole tower, for ``plan``.

        Args:
            hf_config: the model's.
            patches: number of patches, before merging.
            nbytes: bytes of an activation's element.
            recompute: blocks are recomputed and keep their inputs alone.

        Raises:
            ValueError: see ``block_bytes``.
        """
        ...


@dataclass(frozen=True)
class VisionTokens:
    """Tokens that stand for what is seen; a policy must never sample one.

    Attributes:
        image: the placeholder of an image, repeated once per merged patch.
        video: the placeholder of a video, which is refused.
        start, end: they frame an image.
    """

    image: str
    video: str
    start: str
    end: str

    @property
    def all(self) -> tuple[str, ...]:
        return (self.image, self.video, self.start, self.end)


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of a vision tower's input and output.

    Attributes:
        merge: patches along each side that merge into one feature.
        levels: K, deepstack levels: that many language layers, the first ones, are fed.
        hidden: width of a feature.
        patch_values: numbers of one patch.
    """

    merge: int
    levels: int
    hidden: int
    patch_values: int


def family(model_type: str) -> Family:
    """The family of a ``model_type``, as config.json names it.

    Raises:
        ValueError: there is none; the message lists the known ones, and the nearest.
    """
    return registry.model_families.get(model_type)()
