# SPDX-License-Identifier: Apache-2.0
"""What a loss says of a micro-batch, and what becomes of it: megatron-core's three values, and means over all ranks.

``docs/loss_normalisation.md`` says who divides by what.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.types import PackedBatch, TokenStats


@dataclass(frozen=True)
class LossTerms:
    """The result of a loss on one micro-batch. All values are sums, so that micro-batches and ranks add up.

    Attributes:
        loss: scalar sum over tokens, with gradient; also where no token counts (0 times something), because the other
            ranks of the layout wait for this rank's part of the backward pass.
        num_tokens: number of tokens that the loss counts; the gradient is divided by their global number.
        sums: metrics by name, each a scalar sum over those tokens; the same names in every micro-batch and on every
            rank.
    """

    loss: Tensor
    num_tokens: int
    sums: Mapping[str, Tensor]


# loss(share, stats): this context-parallel rank's share of a micro-batch, and its log-probabilities and entropies.
# It is called on the last pipeline stage.
Loss = Callable[[PackedBatch, TokenStats], LossTerms]


def of_micro_batch(loss: Loss, share: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss, number of tokens and sums, as the schedules of megatron-core take them.

    Args:
        loss: the loss.
        share: this context-parallel rank's share of a micro-batch, S tokens.
        output: float32 ``[2, S]``, log-probabilities and entropies, with their graph.

    Raises:
        ValueError: the loss has no gradient.
    """
    terms = loss(share, TokenStats(logprobs=output[0], entropy=output[1]))
    if not terms.loss.requires_grad:
        raise ValueError(
            "the loss of a micro-batch does not depend on the policy's log-probabilities or entropies; a rank "
            "whose tokens do not count must still return 0 times them, or its peers wait for it for ever"
        )
    tokens = torch.tensor(terms.num_tokens, dtype=torch.int, device=output.device)
    sums = {"loss": terms.loss.detach(), "num_tokens": tokens.detach().clone(), **terms.sums}
    return terms.loss, tokens, sums


def global_means(terms: Sequence[Mapping[str, Tensor]], groups: ParallelGroups) -> dict[str, float]:
    """Sum over micro-batches and data- and context-parallel ranks, and divide by the global token count.

    A collective of all ranks.

    Args:
        terms: the sums of ``of_micro_batch`` for each micro-batch on the last stage; empty on other stages.
        groups: the process groups of this rank.

    Returns:
        Each sum by name, ``loss`` among them, over the number of tokens; and ``num_tokens``, that number.

    Raises:
        ValueError: the names are not the same in all micro-batches of all ranks.
    """
    sums: dict[str, float] = {}
    if groups.is_last_stage:
        names = _metric_names(terms, groups)
        local = torch.stack([torch.stack([term[name].double() for name in names]) for term in terms]).sum(0)
        all_reduce(local, group=groups.data_context)
        sums = dict(zip(names, local.tolist(), strict=True))
    if groups.pipeline_size > 1:
        box: list[Any] = [sums]
        dist.broadcast_object_list(box, group=groups.pipeline, group_src=groups.pipeline_size - 1)
        sums = box[0]
    tokens = sums.pop("num_tokens")
    return {**{name: value / max(tokens, 1.0) for name, value in sums.items()}, "num_tokens": tokens}


def _metric_names(terms: Sequence[Mapping[str, Tensor]], groups: ParallelGroups) -> list[str]:
    """Return the metric names, which must agree between all micro-batches of all ranks.

    Otherwise the sum over ranks would abort, or add up unrelated metrics.
    """
    differing = {name for term in terms for name in term.keys() ^ terms[0].keys()}
    names = sorted(terms[0])
    # A 31-bit checksum of the names, and 0 where this rank's micro-batches do not agree among themselves.
    number = 0 if differing else zlib.crc32("\n".join(names).encode()) >> 1
    range_ = torch.tensor([number, -number])
    all_reduce(range_, op=dist.ReduceOp.MAX, group=groups.data_context)
    if differing or int(range_[0]) != -int(range_[1]):
        raise ValueError(
            "a loss must report the same metrics in every micro-batch and on every rank, 0 where it has nothing to "
            f"say; here: {', '.join(names)}; not in all of this rank's micro-batches: {sorted(differing)}"
        )
    return names
