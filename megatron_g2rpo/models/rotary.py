# SPDX-License-Identifier: Apache-2.0
"""Rotary angles from positions on three axes, of which the angles of text are a special case.

megatron-core's ``MultimodalRotaryEmbedding`` lays the (time, height, width) frequencies out in chunks, as Qwen2-VL
does; Qwen3-VL interleaves them (t h w t h w ... t t). The two agree wherever t = h = w, so a text-only test cannot tell
them apart. Here a family states for each frequency the axis whose position drives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# transformers' names of rescaled rotary frequencies that depend on the configuration alone.
SCALED_ROPE_TYPES = ("linear", "llama3")
ROPE_TYPES = ("default", *SCALED_ROPE_TYPES)


def interleaved_axes(mrope_section: Sequence[int]) -> list[int]:
    """Return the position axis (0 time, 1 height, 2 width) that drives each rotary frequency.

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


def head_dim(text_config: Any) -> int:
    """Return the dimension of one attention head; the hidden size's share where the configuration does not name it.

    Args:
        text_config: transformers' configuration of the language model.
    """
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def inverse_frequencies(text_config: Any) -> Tensor:
    """Return the angle per position of each rotary frequency, float32 ``[head_dim / 2]``.

    Args:
        text_config: transformers' configuration of the language model.
    """
    rope = text_config.rope_parameters
    if rope["rope_type"] in SCALED_ROPE_TYPES:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](text_config, torch.device("cpu"))[0]
    width = head_dim(text_config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / rope["rope_theta"] ** exponents


class RotaryAngles(nn.Module):
    """The module that computes rotary angles from positions on three axes, in place of ``GPTModel.rotary_pos_emb``.

    Args:
        inv_freq: float32 ``[head_dim / 2]``, see ``inverse_frequencies``; all of a head is rotated.
        axes: for each frequency the position axis that drives it: 0 time, 1 height, 2 width.

    Raises:
        ValueError: the numbers of frequencies and of axes differ.
    """

    def __init__(self, inv_freq: Tensor, axes: Sequence[int]) -> None:
        super().__init__()
        if len(axes) != len(inv_freq):
            raise ValueError(f"mrope_section must sum to head_dim / 2 = {len(inv_freq)}, not {len(axes)}")
        # Plain attributes, not buffers: Module.bfloat16() would round buffers.
        self.inv_freq = inv_freq
        self.axes = torch.tensor(axes)

    def forward(self, position_ids: Tensor, mrope_section: Any = None, cp_group: Any = None) -> Tensor:
        """Return the angles of the given tokens, which under context parallelism are this rank's share.

        Args:
            position_ids: int64 ``[3, b, s]`` time, height and width positions.
            mrope_section: ignored; megatron-core passes its config's.
            cp_group: ignored, for the same reason.

        Returns:
            float32 ``[s, b, 1, head_dim]``.
        """
        device = position_ids.device
        positions = position_ids.index_select(0, self.axes.to(device)).permute(2, 1, 0).float()  # [s, b, head_dim/2]
        angles = positions * self.inv_freq.to(device)
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)
