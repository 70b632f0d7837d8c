# SPDX-License-Identifier: Apache-2.0
"""What the vision tower keeps for its backward pass, and its features.

It follows transformers' ``Qwen3VLVisionModel`` with ``sdpa`` attention, as ``policy.vision`` runs it on this rank's
share of a row's images. docs/plan.md derives the lines.

Shape letters: V patches (four of them make a merged token), v hidden size, m MLP features, a heads, K deepstack
levels, h hidden size of the language model, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_g2rpo.plan.activations import FP32, INT64


def image_share(images: Sequence[int], peers: int) -> int:
    """Tokens of the peer that encodes the most; the same rule as ``policy.vision.assign_images``.

    Args:
        images: tokens of each image.
        peers: tensor x context parallel ranks, which share the images of a row.
    """
    loads = [0] * peers
    for tokens in sorted(images, reverse=True):
        loads[loads.index(min(loads))] += tokens
    return max(loads)


def block(vision: Any, patches: int, nbytes: int) -> int:
    """Bytes that one block keeps of a number of patches.

    Widths: norm inputs and outputs (4), rotated queries and keys (2), the projection whose view the values are (3), the
    attention's output and, joined over images, the output projection's input (2); the MLP's two linears (2).
    """
    wide = nbytes * patches * (11 * vision.hidden_size + 2 * vision.intermediate_size)
    return wide + patches * (2 * _statistics(nbytes) + FP32 * vision.num_heads)


def _statistics(nbytes: int) -> int:
    """Mean and reciprocal deviation of a row of a layer norm."""
    return 2 * nbytes


def tower(vision: Any, patches: int, nbytes: int, *, recompute: bool) -> int:
    """Bytes kept of a number of patches.

    Args:
        vision: the model's ``vision_config``.
        patches: V, of this rank.
        nbytes: e.
        recompute: blocks are recomputed (``recompute_granularity: full``) and keep their inputs alone.
    """
    if not patches:
        return 0
    e, width, levels, statistics = nbytes, vision.hidden_size, _levels(vision), _statistics(nbytes)
    merged = patches // vision.spatial_merge_size**2
    # Norm's output, the first linear's output, the second's input; merged, four patches are one row of fourfold width.
    merger = 3 * e * patches * width
    of_block = e * patches * width if recompute else block(vision, patches, nbytes)
    kept = vision.depth * of_block + (levels + 1) * merger + levels * merged * statistics
    kept += e * patches * width + patches * statistics  # the last block's output, which the merger's norm keeps
    kept += e * patches * patch_values(vision)
    # Cosines and sines of the rotary embedding; places and weights of the four position embeddings of a patch.
    return kept + 2 * FP32 * patches * (width // vision.num_heads) + patches * 4 * (INT64 + FP32)


def merge(vision: Any, placeholders: int, hidden: int, nbytes: int) -> int:
    """Bytes kept of choosing features for tokens: ``index_copy`` keeps what it copies, ``index_select`` which."""
    return features(vision, placeholders, hidden, nbytes) + INT64 * placeholders


def patch_values(vision: Any) -> int:
    """Numbers of one patch."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def features(vision: Any, tokens: int, hidden: int, nbytes: int) -> int:
    """Bytes of the features of merged tokens, deepstack levels included."""
    return nbytes * tokens * (1 + _levels(vision)) * hidden


def _levels(vision: Any) -> int:
    return len(vision.deepstack_visual_indexes)
