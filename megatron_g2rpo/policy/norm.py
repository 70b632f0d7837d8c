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

    Normalise in fp32, cast to the input's dtype, then multiply: in bf16 another order gives other bits.

    Args:
        config: megatron-core TransformerConfig; only ``sequence_parallel`` is read.
        hidden_size: length of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron-core sums the gradients of parameters marked so over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape and dtype."""
        x32 = x.float()
        normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)
