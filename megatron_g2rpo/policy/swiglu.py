# SPDX-License-Identifier: Apache-2.0
"""The gated activation of the local layers: SwiGLU of the joint projection, as one function.

Without a compiler megatron-core's MLP splits the projection, adds a zero offset to one half, and leaves the gradient's
halves to be joined; all of them, and the activated gate, are kept for the backward pass. Here the gradient's halves are
written where they belong, and only the projection is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` of ``[..., 2F]``, gate first; the result is ``[..., F]``.

    The constructor takes what megatron-core passes to the activation of an MLP, which also asks it for its part of a
    checkpoint: it has none.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, projection: Tensor) -> Tensor:
        """Activate a joint projection."""
        return _SwiGLUFunction.apply(projection)  # type: ignore[return-value]


class _SwiGLUFunction(torch.autograd.Function):
    """SwiGLU that keeps its input alone, and activates the gate again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, projection: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(projection)
        gate, up = projection.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (projection,) = ctx.saved_tensors
        gate, up = projection.chunk(2, dim=-1)
        result = torch.empty_like(projection)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        # silu(x) = x s with s = sigmoid(x), and its slope is s + silu(x) (1 - s): the exponential is taken once.
        sigmoid = gate.sigmoid()
        activated = gate * sigmoid
        torch.mul(grad, activated, out=grad_up)
        slope = sigmoid.add_(activated.addcmul_(activated, sigmoid, value=-1))
        torch.mul(grad, up, out=grad_gate)
        grad_gate.mul_(slope)
        return result
