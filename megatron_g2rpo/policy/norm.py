# SPDX-License-Identifier: Apache-2.0
"""RMSNorm for the local layer spec.

megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism, so the local spec brings its own. Torch has no fused
RMSNorm for CPUs, and autograd through its operations takes three times as long as ``_RMSNormFunction``, forward and
backward, which was a seventh of an update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, in the operation order of transformers' Qwen3-VL.

    It normalises in fp32, casts to the input's dtype, then multiplies: in bf16 another order gives other bits.

    Args:
        config: megatron-core's TransformerConfig; ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: length of the last axis.
        eps: number added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron-core sums the gradients of parameters marked so over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., hidden_size]``; shape and dtype stay the same."""
        return _RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[return-value]


class _RMSNormFunction(torch.autograd.Function):
    """``y = w * x / rms(x)`` with its gradient in closed form: it keeps x and one number a vector.

    With r = 1 / rms(x), h the length of a vector and g the gradient of y::

        dw = sum over vectors of g x r
        dx = r g w - x r^3 / h * sum(g w x)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x32 = x.float()
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_() / x.shape[-1]
        reciprocal = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, reciprocal)
        return (x32 * reciprocal).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, reciprocal = ctx.saved_tensors
        size = x.shape[-1]
        grad32, x32, w32 = (each.float() for each in (grad, x, weight))
        product = (grad32 * x32).reshape(-1, size)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            along = (product @ w32).reshape(reciprocal.shape) * reciprocal.pow(3).mul_(-1 / size)
            grad_x = (grad32 * reciprocal).mul_(w32).addcmul_(x32, along).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (reciprocal.reshape(-1) @ product).to(weight.dtype)
        return grad_x, grad_weight, None
