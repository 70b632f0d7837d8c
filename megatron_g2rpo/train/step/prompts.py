# SPDX-License-Identifier: Apache-2.0
"""A step's prompts on this rank: each decoded by one process of its replica, and exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_g2rpo.collectives import gather
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.stream import PromptStream
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.types import Prompt


def draw(stream: PromptStream, size: int, owned: Sequence[int], groups: ParallelGroups) -> list[Prompt]:
    """Return this data-parallel rank's part of the next ``size`` prompts, see ``shared``. A collective of the replica.

    Args:
        stream: the prompts; it advances by ``size``.
        size: prompts of the global batch.
        owned: which of them are this data-parallel rank's, see ``minibatches.owned_prompts``.
        groups: this rank's place in the layout.

    Raises:
        SampleError, DataError: see ``PromptStream.next_batch``; on every rank of the replica if on any.
    """
    return shared(partial(stream.next_batch, size), owned, groups)


def shared(
    decode: Callable[[Sequence[int]], list[Prompt]], owned: Sequence[int], groups: ParallelGroups
) -> list[Prompt]:
    """Return the prompts of a data-parallel rank, the same on all ranks of its replica.

    Of a replica's ranks each decodes every ``model_size``-th prompt, and gives the others what it made of it, bit for
    bit: what a rank gets does not depend on who decoded it. A collective of the replica.

    Measured with 2 ranks on 2 busy cores, 8 prompts with one image each: 0.94 s without exchange and 0.68 s with it at
    1024 x 1024 pixels, 0.36 s both ways at 512 x 512. Where images are small, the exchange costs what it saves.

    Args:
        decode: decodes some of the prompts by their numbers; every rank calls it once, also for none.
        owned: numbers of the data-parallel rank's.
        groups: this rank's place in the layout.

    Raises:
        DataError: ``decode`` raised it; on every rank of the replica if on any.
    """
    if groups.model_size == 1:
        return decode(owned)
    mine: list[Prompt] = []

    def decode_share() -> list[tuple[Prompt, torch.Size]]:
        mine.extend(decode(owned[groups.model_rank :: groups.model_size]))
        # Pixels are 24 bytes for each of an image's: they travel beside the pickle, without its copies.
        return [(_with_pixels(prompt, torch.zeros(0)), prompt.inputs.pixel_values.shape) for prompt in mine]

    shares = gather(decode_share, groups.model, (DataError,))
    prompts = []
    for place in range(len(owned)):
        number, owner = divmod(place, groups.model_size)
        prompt, shape = shares[owner][number]
        own = owner == groups.model_rank
        pixels = mine[number].inputs.pixel_values.contiguous() if own else torch.empty(shape)
        if pixels.numel():
            dist.broadcast(pixels, group=groups.model, group_src=owner)
        prompts.append(_with_pixels(mine[number] if own else prompt, pixels))
    return prompts


def _with_pixels(prompt: Prompt, pixels: torch.Tensor) -> Prompt:
    return replace(prompt, inputs=replace(prompt.inputs, pixel_values=pixels))
