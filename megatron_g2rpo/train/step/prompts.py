# SPDX-License-Identifier: Apache-2.0
"""A step's prompts on this rank: each decoded by one process of its replica, and exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_g2rpo.collectives import gather
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.stream import PromptStream
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.types import Prompt


def draw(stream: PromptStream, size: int, owned: Sequence[int], groups: ParallelGroups) -> list[Prompt]:
    """Return this data-parallel rank's part of the next ``size`` prompts, the same on all ranks of its replica.

    Of a replica's ranks each decodes every ``model_size``-th prompt, and gives the others token ids and pixels as they
    are: what a rank gets does not depend on who decoded it. A collective of the replica.

    Args:
        stream: the prompts; it advances by ``size``.
        size: prompts of the global batch.
        owned: which of them are this data-parallel rank's, see ``minibatches.owned_prompts``.
        groups: this rank's place in the layout.

    Raises:
        SampleError, DataError: see ``PromptStream.next_batch``; on every rank of the replica if on any.
    """
    if groups.model_size == 1:
        return stream.next_batch(size, owned)
    share = owned[groups.model_rank :: groups.model_size]
    parts = gather(lambda: stream.next_batch(size, share), groups.model, (DataError,))
    return [parts[place % groups.model_size][place // groups.model_size] for place in range(len(owned))]
