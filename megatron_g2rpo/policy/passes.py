# SPDX-License-Identifier: Apache-2.0
"""Passes of packed rows through the policy's pipeline, each context-parallel rank with its share of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_g2rpo import progress
from megatron_g2rpo.collectives import all_gather
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.layouts import context_parallel
from megatron_g2rpo.policy.loss_terms import Loss, of_micro_batch
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.policy.work import RowWork, Work, row_work
from megatron_g2rpo.types import PackedBatch, TokenStats


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Runs packed rows through a model. Every method is a collective of the replica, whose ranks pass the same rows.

    Attributes:
        module: this rank's pipeline stage of the model; in its DDP wrapper, where gradients are asked for.
        device: this rank's device.
        groups: the process groups of this rank.
        work: what the passes have computed so far; it grows.
    """

    module: nn.Module
    device: Device
    groups: ParallelGroups
    work: Work

    def forward(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Run rows forward, without a backward pass.

        Returns:
            For each row float32 ``[2, S]`` on the CPU, log-probabilities and entropies of this context-parallel rank's
            share of S tokens, on the last stage; an empty list on other stages.
        """
        self.work.forward += _work(batches)
        return self._run(batches, _on_the_cpu, temperature, forward_only=True)

    def backward(
        self, batches: Sequence[PackedBatch], loss: Loss, temperature: float
    ) -> tuple[list[Tensor], list[Mapping[str, Tensor]]]:
        """Run rows forward and backward, so that the gradients of the module hold that of the global minibatch.

        Returns:
            For each row, on the last stage, what ``forward`` returns, but on the device; and the sums of its loss, see
            ``of_micro_batch``. Two empty lists on other stages.
        """
        self.work.trained += _work(batches)
        shares: list[Tensor] = []  # eight bytes a token, which stay on the device until all rows have run

        def consume(share: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            shares.append(output.detach())
            return of_micro_batch(loss, share, output)

        return shares, self._run(batches, consume, temperature, forward_only=False)

    def _run(
        self, batches: Sequence[PackedBatch], consume: Callable[..., Any], temperature: float, *, forward_only: bool
    ) -> list[Any]:
        """Run all micro-batches through the pipeline.

        Returns the results of ``consume(share, output)`` for each micro-batch on the last stage, and an empty list on
        other stages.
        """
        size, rank = self.groups.context_size, self.groups.context_rank

        def forward_step(iterator: Iterator[PackedBatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            progress.advance()
            share = _to(context_parallel.split(next(iterator), size, rank), self.device.torch_device)
            with self.device.computing():
                output = model(share, temperature)
            return output, partial(consume, share)

        with self.device.megatron():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=[self.module],
                num_microbatches=len(batches),
                seq_length=max(len(batch.tokens) for batch in batches),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def whole_rows(self, batches: Sequence[PackedBatch], shares: Sequence[Tensor]) -> list[TokenStats]:
        """Join the context-parallel shares, which the last stage has, and send the result to the other stages.

        Args:
            batches: the rows.
            shares: for each row ``[2, S]``, on the CPU; on stages before the last nothing.

        Returns:
            For each row its log-probabilities and entropies, on the CPU, on every rank of the replica.
        """
        groups = self.groups
        sizes = [len(batch.tokens) for batch in batches]
        stats = torch.empty(2, sum(sizes), dtype=torch.float32)
        if groups.is_last_stage and batches:
            parts = all_gather(torch.cat(list(shares), dim=1), group=groups.context)
            by_row = [part.split([size // groups.context_size for size in sizes], dim=1) for part in parts]
            whole = [
                torch.cat([part[index] for part in by_row], dim=1)[
                    :, context_parallel.gathered_places(batch.cu_seqlens_padded, groups.context_size)
                ]
                for index, batch in enumerate(batches)
            ]
            stats = torch.cat(whole, dim=1)
        if groups.pipeline_size > 1:
            dist.broadcast(stats, group=groups.pipeline, group_src=groups.pipeline_size - 1)
        return [TokenStats(logprobs=row[0], entropy=row[1]) for row in stats.split(sizes, dim=1)]


def _work(batches: Sequence[PackedBatch]) -> RowWork:
    return sum(map(row_work, batches), RowWork())


def _on_the_cpu(share: PackedBatch, output: Tensor, non_loss_data: bool) -> Tensor:
    return output.cpu()


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Move the batch to the device, except its images, of which the vision encoder moves this rank's share."""
    names = {field.name for field in fields(batch)} - {"pixel_values", "image_grid_thw"}
    tensors = {name: value for name in names if isinstance(value := getattr(batch, name), Tensor)}
    return replace(batch, **{name: value.to(device) for name, value in tensors.items()})
