# SPDX-License-Identifier: Apache-2.0
"""What a plan asks of a model's vision: its features; what the tower keeps is the family's to say (``models``).

Shape letters: h hidden size of the language model, K deepstack levels, e bytes of an element.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_g2rpo import models


def vision_of(hf_config: Any) -> models.Vision:
    """The vision of a model that sees.

    Raises:
        ValueError: the model is of an unknown family, or of a text-only one.
    """
    vision = models.family(hf_config.model_type).vision
    if vision is None:
        raise ValueError(f"model type {hf_config.model_type!r} is text-only; a plan knows models that see")
    return vision


def geometry_of(hf_config: Any) -> models.VisionGeometry:
    """Sizes of the tower's input and output; raises as ``vision_of`` does."""
    return vision_of(hf_config).geometry(hf_config)


def merge(geometry: models.VisionGeometry, placeholders: int, nbytes: int) -> int:
    """Bytes kept of choosing features for tokens: ``index_copy`` keeps what it copies, ``index_select`` which."""
    return features(geometry, placeholders, nbytes) + torch.int64.itemsize * placeholders


def features(geometry: models.VisionGeometry, tokens: int, nbytes: int) -> int:
    """Bytes of the features of merged tokens, deepstack levels included: e (1 + K) h each."""
    return nbytes * tokens * (1 + geometry.levels) * geometry.hidden
