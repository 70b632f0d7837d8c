# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a plan's model; ``models.flops`` has the formulas."""

from __future__ import annotations

from megatron_g2rpo.models import flops
from megatron_g2rpo.models.flops import Flops, Shape, causal_pairs, forward
from megatron_g2rpo.plan.model import Model

__all__ = ["Flops", "Shape", "causal_pairs", "forward", "shape_of"]


def shape_of(model: Model) -> Shape:
    """Return the shape of a dense model."""
    return flops.shape_of(model.config, weights=model.numel)
