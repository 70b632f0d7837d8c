# SPDX-License-Identifier: Apache-2.0
"""The ``policy.megatron_cfg.fp8_cfg`` section: which arithmetic is 8-bit, in NeMo-RL's and Megatron-core's names."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megatron_g2rpo.recipe.base import Section, conflict

Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


class Fp8Config(Section):
    """``policy.megatron_cfg.fp8_cfg``: matrix products of the language layers in FP8, by Transformer Engine."""

    enabled: bool
    """Compute the linear layers of the language model in FP8; the other keys count only then. Embedding, output layer,
    vision tower, norms and attention stay in ``policy.precision``."""
    fp8: Literal["e4m3", "hybrid"]
    """FP8 format: ``e4m3`` everywhere, or ``hybrid``, in which gradients are e5m2."""
    fp8_recipe: Fp8Recipe
    """How scales are found: one a tensor, of its own values (``tensorwise``) or of earlier ones (``delayed``); one a
    block of 128 (``blockwise``) or of 32 (``mxfp8``, Blackwell)."""
    fp8_param: bool
    """Keep the weights themselves in FP8, beside the optimizer's float32 copies."""

    @model_validator(mode="after")
    def _formats(self) -> Fp8Config:
        if self.enabled and self.fp8 == "hybrid" and self.fp8_recipe == "mxfp8":
            raise conflict("training with mxfp8 and e5m2 gradients diverges: set fp8 to e4m3", "fp8", "fp8_recipe")
        return self
