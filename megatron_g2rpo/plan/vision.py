# SPDX-License-Identifier: Apache-2.0
"""Memory of a model's image features; what the vision tower keeps is derived by the model family (``models``).

Shape letters: h hidden size of the language model, K deepstack levels, e bytes of an element.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_g2rpo import models


def vision_of(hf_config: Any) -> models.Vision:
    """Return the vision of a vision-language model.

    Raises:
        ValueError: the model's family is unknown or text-only.
    """
    vision = models.family(hf_config.model_type).vision
    if vision is None:
        raise ValueError(f"model type {hf_config.model_type!r} is a text-only model")
    return vision


def sees(hf_config: Any) -> bool:
    """Return whether a model of a registered family takes images."""
    return models.family(hf_config.model_type).vision is not None


def geometry_of(hf_config: Any) -> models.VisionGeometry:
    """Return the sizes of the vision tower's input and output; raises what ``vision_of`` raises."""
    return vision_of(hf_config).geometry(hf_config)


def merge(geometry: models.VisionGeometry, placeholders: int, nbytes: int) -> int:
    """Return the bytes that autograd keeps of copying image features to their placeholders.

    ``index_copy`` keeps the features that it copies, ``index_select`` keeps their indices.
    """
    return features(geometry, placeholders, nbytes) + torch.int64.itemsize * placeholders


def features(geometry: models.VisionGeometry, tokens: int, nbytes: int) -> int:
    """Return the bytes of the features of ``tokens`` merged tokens, deepstack levels included: e (1 + K) h each."""
    return nbytes * tokens * (1 + geometry.levels) * geometry.hidden
