# SPDX-License-Identifier: Apache-2.0
"""What the rollout engine asks of a policy's vision cache when it generates for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_g2rpo.models.images import Image, images_of
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch


@torch.no_grad()
def generate(policy: MegatronPolicy, rows: Sequence[PackedBatch], *, begins: bool = True) -> list[Tensor]:
    """Ask for the features of all images of the rows, with graphs to be kept, as an engine with equal weights does.

    Args:
        policy: a policy with a cache.
        rows: packed rows.
        begins: whether a training step begins; else it is a validation.
    """
    cache, model = policy.vision_cache, policy.model
    assert cache is not None
    images = {image.name: image for row in rows for image in images_of(row.pixel_values, row.image_grid_thw)}
    if begins:
        cache.begin_step()

    def encode(images: Sequence[Image]) -> Sequence[Tensor]:
        encoder: Any = model._encode_images
        return [encoder.encode([image])[0] for image in images]

    return cache.features(
        list(images.values()),
        encode,
        version=cache.version,
        dtype=policy.dtype,
        device=policy.device.torch_device,
        keep_graphs=True,
    )
