# SPDX-License-Identifier: Apache-2.0
"""RMSNorm for the local layer spec.

megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism, so the local spec brings its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        x32 = x.float()
        normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)
