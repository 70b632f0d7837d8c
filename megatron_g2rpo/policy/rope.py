# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL's interleaved multimodal rotary embedding.

megatron-core's ``MultimodalRotaryEmbedding`` lays the (time, height, width) frequencies out in chunks, as Qwen2-VL
does; Qwen3-VL interleaves them (t h w t h w ... t t). The two agree wherever t = h = w, so a text-only test cannot tell
them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def interleaved_axis(mrope_section: Sequence[int]) -> list[int]:
    """Which position row (0 time, 1 height, 2 width) drives each rotary frequency.

    Source: ``Qwen3VLTextRotaryEmbedding.recomposition_frequencies`` of transformers.

    Args:
        mrope_section: number of frequencies of (time, height, width); sums to ``head_dim / 2``.

    Returns:
        ``head_dim / 2`` axis numbers; ``[4, 2, 2]`` gives ``[0, 1, 2, 0, 1, 2, 0, 0]``.
    """
    axes = [0] * sum(mrope_section)
    for axis in (1, 2):
        for index in range(axis, 3 * mrope_section[axis], 3):
            axes[index] = axis
    return axes


class InterleavedMRoPE(nn.Module):
    """Rotary angles from three rows of positions; takes the place of ``GPTModel.rotary_pos_emb``.

    Args:
        head_dim: dimension of one attention head; all of it is rotated.
        rope_theta: base period.
        mrope_section: see ``interleaved_axis``.
    """

    def __init__(self, head_dim: int, rope_theta: float, mrope_section: Sequence[int]) -> None:
        super().__init__()
        if 2 * sum(mrope_section) != head_dim:
            raise ValueError(f"mrope_section {list(mrope_section)} must sum to head_dim / 2 = {head_dim // 2}")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        # Plain attributes, not buffers: Module.bfloat16() would round buffers.
        self.inv_freq = 1.0 / rope_theta**exponents
        self.axis = torch.tensor(interleaved_axis(mrope_section))

    def forward(self, position_ids: Tensor, mrope_section: Any = None, cp_group: Any = None) -> Tensor:
        """Angles of the given tokens (already this rank's share under context parallelism).

        Args:
            position_ids: int64 ``[3, b, s]``.
            mrope_section: ignored; megatron-core passes its config's.
            cp_group: ignored, for the same reason.

        Returns:
            float32 ``[s, b, 1, head_dim]``.
        """
        device = position_ids.device
        positions = position_ids.index_select(0, self.axis.to(device)).permute(2, 1, 0).float()  # [s, b, head_dim/2]
        angles = positions * self.inv_freq.to(device)
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)
