# SPDX-License-Identifier: Apache-2.0
"""Rotation of queries and keys by their positions, for the local core attention.

megatron-core's ``apply_rotary_pos_emb`` takes cosines and sines of the angles anew in every layer, for queries and for
keys, and joins copies of halves of heads. Here they are taken once a row, and a rotation is one product and two
in-place additions; its gradient is the rotation back. The angles are those of ``models.rotary``: the second half of a
head has the angles of the first, and number d is rotated with number d + D / 2.

Shape letters: S tokens, H heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of a row's angles.

    Attributes:
        cos, sin: ``[S, 1, D]``, in the dtype of queries and keys.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """Take cosines and sines of float32 angles ``[S, 1, 1, D]``."""
        angles = angles.squeeze(1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate queries or keys ``[S, H, D]``."""
        return _Rotate.apply(heads, self.cos, self.sin)  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    """The rotation, which keeps nothing but the angles' cosines and sines."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    (first, second), (first_sin, second_sin) = heads.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    result = heads * cos
    first_result, second_result = result.chunk(2, dim=-1)
    first_result.addcmul_(second, first_sin, value=-direction)
    second_result.addcmul_(first, second_sin, value=direction)
    return result
