# SPDX-License-Identifier: Apache-2.0
"""Model families, in one file each; ``base.Family`` says what such a file holds.

Importing this package registers its families. It imports no megatron-core (``plan`` imports it), and transformers'
modelling code only when a vision tower is built.
"""

from megatron_g2rpo.models import llama, qwen3, qwen3_vl
from megatron_g2rpo.models.base import Family, Positions, Vision, VisionGeometry, VisionTokens, family

__all__ = [
    "Family",
    "Positions",
    "Vision",
    "VisionGeometry",
    "VisionTokens",
    "family",
    "llama",
    "qwen3",
    "qwen3_vl",
]
