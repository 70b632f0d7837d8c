# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of context parallelism: which tokens of a packed row belong to which rank.

Every segment is cut into ``2 * C`` chunks of equal length for ``C`` ranks, and rank ``r`` holds chunks ``r`` and
``2 * C - 1 - r`` of each ("zigzag"): under a causal mask every rank then has the same work. This is the split that
Transformer Engine's attention expects of a packed ("thd") batch.

Everything that looks at a token's neighbours (labels, positions, the place of image features) is made on the whole row
and then cut; made on a share, it would be wrong at every chunk's border.

Shape letters: S tokens of the row, N segments, C context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron_g2rpo.types import PackedBatch

_PER_ROW = frozenset({"cu_seqlens", "cu_seqlens_padded", "parents", "pixel_values", "image_grid_thw", "sequence_ids"})


def local_tokens(cu_seqlens_padded: Tensor, size: int, rank: int) -> Tensor:
    """Return the positions in the row of the tokens that a rank holds, in the order in which it holds them.

    Args:
        cu_seqlens_padded: int32 ``[N + 1]``, see ``PackedBatch``.
        size: C, the number of context-parallel ranks.
        rank: the context-parallel rank, from 0 to ``size - 1``.

    Returns:
        int64 ``[S / C]`` positions.

    Raises:
        ValueError: a segment cannot be cut into ``2 * C`` chunks.
    """
    offsets = cu_seqlens_padded.tolist()
    if size == 1:
        return torch.arange(offsets[-1])
    pieces = []
    for start, end in pairwise(offsets):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            raise ValueError(
                f"a padded segment of {end - start} tokens cannot be cut into {2 * size} chunks: pack rows with the "
                "multiples of policy.layouts.layout.token_multiples"
            )
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(pieces)


def gathered_places(cu_seqlens_padded: Tensor, size: int) -> Tensor:
    """Return where each token of the row lies in the concatenation of all ranks' shares: int64 ``[S]``."""
    shares = torch.cat([local_tokens(cu_seqlens_padded, size, rank) for rank in range(size)])
    places = torch.empty_like(shares)
    places[shares] = torch.arange(len(shares))
    return places


def split(batch: PackedBatch, size: int, rank: int) -> PackedBatch:
    """Return a rank's share of a row.

    Fields with one value per token are cut; ``cu_seqlens*``, ``parents``, the images and ``sequence_ids`` stay those of
    the row.
    """
    if size == 1:
        return batch
    tokens = local_tokens(batch.cu_seqlens_padded, size, rank)
    cut = {
        field.name: value.index_select(-1, tokens)
        for field in fields(batch)
        if field.name not in _PER_ROW and isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **cut)
