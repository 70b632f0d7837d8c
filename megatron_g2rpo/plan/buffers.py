# SPDX-License-Identifier: Apache-2.0
"""Weights, gradients and optimizer state of one rank, exact to the byte.

megatron-core's DDP keeps the gradients of all trained parameters in one contiguous buffer, last parameter first. Under
the distributed optimizer a second such buffer takes the weights, parameters begin at multiples of 64 elements, buckets
end at multiples of ``lcm(data-parallel size, 128)``, and each data-parallel rank keeps the optimizer state of one equal
slice of every bucket. Source: ``_ParamAndGradBuffer`` and ``DistributedOptimizer._build_model_gbuf_range`` of
megatron-core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_g2rpo.data.bins import round_up
from megatron_g2rpo.plan.model import Parameter

_PARAMETER_ALIGNMENT = 64  # elements
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class DataParallelism:
    """Data-parallel sizes, and the options of ``policy.megatron_cfg.distributed_data_parallel_config``.

    Attributes:
        size: number of data x context parallel ranks; gradients are summed and optimizer state is sharded over them.
        data: number of data-parallel ranks alone; megatron-core sizes its buckets by it.
        distributed_optimizer: the recipe's ``use_distributed_optimizer``.
        overlap_grad_reduce: whether gradients are reduced bucket by bucket (on the first pipeline stage).
        grad_bytes: bytes of one gradient element in the buffer.
    """

    size: int
    data: int
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    grad_bytes: int

    def bucket_size(self, stage: int) -> int | None:
        """Return the number of elements that fill a bucket; None puts all elements into one bucket.

        Only the first stage's reduction is worth splitting.
        """
        if not self.overlap_grad_reduce or stage > 0:
            return None
        return max(40_000_000, 1_000_000 * self.data)


@dataclass(frozen=True)
class Buffer:
    """Layout of one DDP buffer.

    Attributes:
        spans: ``(start, end)`` of each parameter, in elements; in the order of the buffer, which is the reverse of the
            model's.
        buckets: ``(start, end)`` of each bucket, in elements, padding included.
    """

    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Number of elements of the buffer, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, rank: int, size: int) -> list[int]:
        """Return how many elements of each parameter a rank updates; parameters without any are left out.

        Args:
            rank: the rank in the data x context parallel group.
            size: number of ranks of that group.
        """
        counts = []
        for start, end in self.spans:
            count = 0
            for first, last in self.buckets:
                slice_ = (last - first) // size
                mine = first + rank * slice_
                count += max(0, min(end, mine + slice_) - max(start, mine))
            if count:
                counts.append(count)
        return counts

    def most_owned(self, size: int) -> int:
        """Return the most elements that any of ``size`` ranks updates: the largest sum of ``owned``."""
        if not self.buckets:
            return 0
        edges = np.array([0, *(edge for span in self.spans for edge in span)], dtype=np.float64)
        lengths = np.diff(edges)
        lengths[0::2] = 0  # padding lies between parameters
        before = np.concatenate(([0.0], np.cumsum(lengths)))  # parameters' elements before each edge
        firsts, lasts = np.array(self.buckets, dtype=np.float64).T
        cuts = firsts + np.arange(size + 1)[:, None] * ((lasts - firsts) / size)
        counted = np.interp(cuts, edges, before)  # exact: slopes are 0 and 1, and numbers far below 2^53
        return round(float(np.diff(counted, axis=0).sum(axis=1).max()))


def ddp_buffer(parameters: Sequence[Parameter], parallelism: DataParallelism, stage: int) -> Buffer:
    """Lay out the DDP buffer of a rank's trained parameters.

    Args:
        parameters: the rank's parameters, in the model's order.
        parallelism: data-parallel sizes and buffer options.
        stage: the rank's pipeline stage.
    """
    padded, limit = parallelism.distributed_optimizer, parallelism.bucket_size(stage)
    alignment = math.lcm(parallelism.size, _BUCKET_ALIGNMENT) if padded else 1
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    begin = end = 0  # of the open bucket
    for parameter in reversed([parameter for parameter in parameters if parameter.trains]):
        start = round_up(end, _PARAMETER_ALIGNMENT if padded else 1)
        alone = padded and parameter.shared
        if alone and end > begin:
            # As megatron-core does: the closed bucket ends where the aligned parameter would have begun.
            buckets.append((begin, round_up(start, alignment)))
            begin = start = buckets[-1][1]
        end = start + parameter.numel
        spans.append((start, end))
        if alone or (limit is not None and end - begin >= limit):
            buckets.append((begin, round_up(end, alignment)))
            begin = end = buckets[-1][1]
    if end > begin:
        buckets.append((begin, round_up(end, alignment)))
    return Buffer(tuple(spans), tuple(buckets))


@dataclass(frozen=True)
class ModelState:
    """Bytes that one rank holds for the whole run.

    Attributes:
        weights: bytes of the model's weights, frozen ones included.
        gradients: bytes of the DDP buffer; where that is not float32, also of the float32 copies that the optimizer
            makes of this rank's part of it and keeps until the next step begins.
        optimizer: bytes of Adam's two moments and, under bfloat16, of float32 master copies (torch's step counters, one
            number a parameter, are not counted: they live on the host).
        updated: number of parameter elements that this rank's optimizer updates.
        parameters: number of elements of the model's weights on this rank, without padding.
        fp8: bytes of FP8 weights that are held beside ``weights``.
    """

    weights: int
    gradients: int
    optimizer: int
    updated: int
    parameters: int
    fp8: int

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and optimizer state together."""
        return self.weights + self.fp8 + self.gradients + self.optimizer


@dataclass(frozen=True)
class Fp8Weights:
    """What FP8 changes of a rank's weights, in bytes.

    Attributes:
        saved: bytes by which the model's own weights are smaller (``fp8_param``).
        copies: bytes of FP8 weights that are held beside the model's own.
    """

    saved: int = 0
    copies: int = 0


def model_state(
    parameters: Sequence[Parameter],
    parallelism: DataParallelism,
    stage: int,
    *,
    nbytes: int,
    rank: int | None = None,
    fp8: Fp8Weights = Fp8Weights(),
) -> ModelState:
    """Return the bytes of weights, gradients and optimizer state that one rank of a stage holds.

    Args:
        parameters: the rank's parameters, in the model's order.
        parallelism: data-parallel sizes and buffer options.
        stage: the rank's pipeline stage.
        nbytes: bytes of one weight: 4 (float32) or 2 (bfloat16).
        rank: the rank in the data x context parallel group; None takes the rank that holds the most.
        fp8: what FP8 changes of the weights.
    """
    buffer = ddp_buffer(parameters, parallelism, stage)
    total, frozen = sum(p.numel for p in parameters), sum(p.numel for p in parameters if not p.trains)
    held, updated = total, total - frozen
    if parallelism.distributed_optimizer:
        held = frozen + buffer.numel  # DDP moves the weights into a buffer padded like the gradients'
        size = parallelism.size
        updated = buffer.most_owned(size) if rank is None else sum(buffer.owned(rank, size))
    moments, master = 8, 0 if nbytes == 4 else 4
    gradient_copy = 0 if parallelism.grad_bytes == 4 else 4
    return ModelState(
        weights=nbytes * held - fp8.saved,
        gradients=parallelism.grad_bytes * buffer.numel + gradient_copy * updated,
        optimizer=(moments + master) * updated,
        updated=updated,
        parameters=total,
        fp8=fp8.copies,
    )
