# SPDX-License-Identifier: Apache-2.0
"""Runs transformers' Qwen3-VL vision tower on many small images without a call for each.

The modules, the parameters and their names are transformers'. Three things of a pass are done otherwise, with the same
numbers but for rounding:

- transformers' ``sdpa`` path attends to one frame at a time, in every block. Here neighbours of equal size are a batch.
- The patch embedding is a convolution whose kernel is its stride: a linear layer on patches that are flat already.
- Where a patch lies in its image follows from the image's grid alone: it is computed once a grid, on the host, so that
  a GPU is not waited for in every block.

A pass is handed to transformers through its public seams: an attention function of its ``AttentionInterface``, and the
arguments with which ``transformers.vision_utils`` lets callers compute positions and bounds ahead.
``tests/contract/test_vision_tower.py`` holds transformers to both.

Shape letters: V patches, A attention heads, D head dimension, v hidden size, F merged features, K deepstack levels,
h hidden size of the language model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

ATTENTION = "megatron_g2rpo_frames"
# Grids whose positions are kept: 64 bytes a patch, so 67 MB if all are of 16,384 patches.
_GRIDS = 64

Grid = tuple[int, int, int]
Run = tuple[int, int]


def build(vision_config: Any, dtype: torch.dtype) -> nn.Module:
    """Build the tower, with parameters in ``dtype`` that are not initialised.

    Args:
        vision_config: transformers' ``Qwen3VLVisionConfig``.
        dtype: dtype of the parameters; the rotary frequencies stay float32.
    """
    # The dtype goes to the constructor: `.to(bfloat16)` would round the rotary frequencies as well, and turn by
    # 0.1 rad at position 60.
    with no_init_weights():  # weights come from a checkpoint, as the language model's do
        # A copy, because transformers writes the attention's name into it.
        config = copy.deepcopy(vision_config)
        tower: Any = Qwen3VLVisionModel._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    tower.patch_embed.proj = PatchProjection(tower.patch_embed.proj)
    # Else transformers looks for an embedding of tokens when blocks are recomputed, and warns.
    tower.main_input_name = "hidden_states"
    return tower


def encode(tower: Any, pixels: Tensor, grids: Tensor) -> Tensor:
    """Run a tower of ``build`` on images.

    Args:
        tower: the tower.
        pixels: ``[V, numbers of a patch]`` patches of all images, in the tower's dtype.
        grids: int64 ``[I, 3]``, patches of each image along time, height and width, before merging.

    Returns:
        ``[F, 1 + K, h]``, see ``models.base.Vision.features``.

    Raises:
        ValueError: the tower attends otherwise than those of ``build``: it would see the whole row as one image.
    """
    if tower.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"this vision tower attends with {tower.config._attn_implementation!r}, which cannot tell a row's images "
            "apart here: build it by the family's Vision.tower, and load the weights into that"
        )
    known: list[Grid] = [(time, height, width) for time, height, width in grids.tolist()]
    table = (tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners)
    places = [_places(grid, tower.spatial_merge_size, *table) for grid in known]
    entries, weights, positions = (torch.cat(each).to(pixels.device) for each in zip(*places, strict=True))
    output = tower(
        pixels,
        grid_thw=grids,
        interp_indices=entries,
        interp_weights=weights,
        position_ids=positions,
        # One segment, on the host: transformers hands the whole row to `attention`, which knows the frames.
        cu_seqlens=torch.tensor([0, len(pixels)], dtype=torch.int32, device="cpu"),
        runs=frame_runs(known),
        return_dict=True,
    )
    return torch.stack([output.pooler_output, *output.deepstack_features], dim=1)


def frame_runs(grids: Iterable[Grid]) -> tuple[Run, ...]:
    """Return runs of neighbouring frames of equal size: how many, and how many patches each has.

    A frame is what attends to itself: one step of an image's time axis.
    """
    sizes = [height * width for time, height, width in grids for _ in range(time)]
    return tuple((len(list(same)), size) for size, same in groupby(sizes))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    runs: Sequence[Run] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a block: every frame's patches attend to each other, frames of equal size in one call.

    Args:
        module: the block's attention layer.
        query, key, value: ``[1, A, V, D]``.
        attention_mask: None: frames alone bound what a patch sees.
        scaling: factor of the scores.
        dropout: probability.
        is_causal: False.
        runs: see ``frame_runs``; None: all patches are one frame.

    Returns:
        ``[1, V, A, D]``, and no attention weights.

    Raises:
        ValueError: a mask is given or asked for.
    """
    if attention_mask is not None or is_causal:
        raise ValueError(f"{type(module).__name__}: the attention {ATTENTION!r} takes no mask; patches see their frame")
    runs = runs or [(1, query.shape[2])]
    lengths = [frames * size for frames, size in runs]
    pieces = zip(*(each[0].split(lengths, dim=1) for each in (query, key, value)), runs, strict=True)
    # Each head in memory of its own: at thousands of patches torch's kernel for CPUs takes a few percent less then, the
    # copies included, and the values alone are kept for the backward pass, not the projection that they are a view of.
    attended = [
        F.scaled_dot_product_attention(
            *(each.unflatten(1, run).transpose(0, 1).contiguous() for each in piece), dropout_p=dropout, scale=scaling
        )
        for *piece, run in pieces
    ]
    rows = [each.transpose(1, 2).flatten(0, 1) for each in attended]
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[None], None


AttentionInterface.register(ATTENTION, attention)


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is its stride, on patches that are cut out already: a linear layer.

    torch's convolution of such patches takes several times as long, in bfloat16 on a CPU hundreds of times.

    Args:
        convolution: the layer whose weight ``[v, channels, frames, height, width]`` and bias ``[v]`` become this one's.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        like = convolution
        super().__init__(like.in_channels, like.out_channels, like.kernel_size, like.stride, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = like.weight, like.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[V, v]`` of patches ``[V, channels, frames, height, width]``."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)


@lru_cache(maxsize=_GRIDS)
def _places(grid: Grid, merge: int, side: int, mode: str, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the patches of an image lie, on the host.

    Args:
        grid: its patches along time, height and width.
        merge: patches merged along each side.
        side: side of the square table of position embeddings.
        mode, align_corners: how the table is interpolated, see ``torch.nn.functional.interpolate``.

    Returns:
        int64 ``[V, 4]`` and float32 ``[V, 4]``, the entries of the table around each patch and their weights (16 where
        the mode is bicubic); int64 ``[V, 2]``, its row and column.
    """
    grids = torch.tensor([grid], device="cpu")
    entries, weights = get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=side, mode=mode, align_corners=align_corners, spatial_merge_size=merge
    )
    return entries, weights, get_vision_position_ids(grids, merge)
