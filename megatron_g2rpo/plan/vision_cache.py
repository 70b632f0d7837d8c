# SPDX-License-Identifier: Apache-2.0
"""Host memory of the image features that ranks keep, so that an image is not encoded twice with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.plan import vision
from megatron_g2rpo.plan.kept import element_bytes
from megatron_g2rpo.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class CachedImages:
    """Bytes of image features in host memory.

    Attributes:
        most: bytes that a rank keeps at most; 0 where it keeps none.
        node: bytes that the ranks of a node keep at most, together.
        image: bytes of the features of one image of the assumed size; 0 without images.
    """

    most: int
    node: int
    image: int

    @property
    def images(self) -> int:
        """Number of images of the assumed size that a rank keeps at most."""
        return self.most // self.image if self.image else 0


def cached_images(recipe: Recipe, hf_config: Any, image_tokens: int) -> CachedImages:
    """Return what the cache of image features takes (``models.vision_cache``), whatever it comes to hold.

    Args:
        recipe: the recipe, of which ``policy.vision_cache_mb`` is read.
        hf_config: transformers' configuration of the model; a text-only one has no features.
        image_tokens: number of tokens of an image, after merging.
    """
    if not vision.sees(hf_config):
        return CachedImages(most=0, node=0, image=0)
    most = recipe.policy.vision_cache_mb * 10**6
    image = vision.features(vision.geometry_of(hf_config), image_tokens, element_bytes(recipe))
    return CachedImages(most=most, node=recipe.cluster.gpus_per_node * most, image=image)
