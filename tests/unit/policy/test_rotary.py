# SPDX-License-Identifier: Apache-2.0
"""Claim: the local core attention's rotation is megatron-core's, and its gradient is the rotation back."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_g2rpo.policy.rotary import Rotation
from tests.common.compare import relative_distance


def angles_and_heads(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Angles ``[S, 1, 1, D]`` as `RotaryAngles` makes them, heads ``[S, H, D]``, a view as of a joint projection."""
    generator = torch.Generator().manual_seed(0)
    half = 100 * torch.rand(37, 1, 1, 12, generator=generator)
    projection = torch.randn(37, 3, 4 * 24, generator=generator).to(dtype)
    return torch.cat((half, half), dim=-1), projection[..., :24], torch.randn(37, 3, 24, generator=generator).to(dtype)


# One multiplication and one addition are rounded once each; in bf16 megatron-core rounds the two products as well.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 / 256)])
def test_rotation_and_gradient_are_megatron_cores(dtype: torch.dtype, tolerance: float) -> None:
    angles, heads, upstream = angles_and_heads(dtype)
    mine, theirs = heads.clone().requires_grad_(), heads.clone().requires_grad_()
    rotated = Rotation.of(angles, dtype)(mine)
    expected = _apply_rotary_pos_emb_bshd(theirs.unsqueeze(1), angles).squeeze(1)
    rotated.backward(upstream)
    expected.backward(upstream)
    assert mine.grad is not None
    assert theirs.grad is not None
    for result, right in ((rotated, expected), (mine.grad, theirs.grad)):
        assert result.dtype is dtype
        assert relative_distance(result.detach(), right.detach()) < tolerance
    assert torch.equal(Rotation.of(angles, dtype)(heads), rotated), "a view's strides do not matter"


def test_a_rotation_keeps_lengths_and_the_wrong_direction_is_seen() -> None:
    angles, heads, _ = angles_and_heads(torch.float32)
    right, back = Rotation.of(angles, torch.float32), Rotation.of(-angles, torch.float32)
    # fp32: a length is a sum of 24 squares.
    torch.testing.assert_close(right(heads).norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(back(right(heads)), heads, rtol=0, atol=1e-5)
    assert float((back(heads) - right(heads)).norm() / heads.norm()) > 0.1
