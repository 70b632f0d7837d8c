# SPDX-License-Identifier: Apache-2.0
"""The policy's process groups, as megatron-core's ``parallel_state`` makes them."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_g2rpo.policy.device import Device, init_process_group
from megatron_g2rpo.policy.layouts.layout import Layout


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the layout.

    Attributes:
        collection: megatron-core's process groups.
        data: the data-parallel group; its ranks hold the same weights and different rollouts.
        data_rank, data_size: this rank's position in the data-parallel group, and the group's size.
        data_context: the data x context parallel group; its ranks hold the same weights and different tokens.
        tensor: the tensor-parallel group.
        tensor_rank, tensor_size: this rank's position in the tensor-parallel group, and the group's size.
        context: the context-parallel group; its ranks hold shares of the same packed rows.
        context_rank, context_size: this rank's position in the context-parallel group, and the group's size.
        pipeline: the pipeline-parallel group, in the order of the stages.
        pipeline_rank, pipeline_size: this rank's pipeline stage, and the number of stages.
        row: the tensor x context parallel group; its ranks are those of one stage that work on the same packed row.
        model: the model-parallel group (tensor x pipeline x context); its ranks share one replica and its rollouts.
        model_rank, model_size: this rank's position in the model-parallel group, and the group's size.
    """

    collection: ProcessGroupCollection
    data: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_context: dist.ProcessGroup
    tensor: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    context: dist.ProcessGroup
    context_rank: int
    context_size: int
    pipeline: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    row: dist.ProcessGroup
    model: dist.ProcessGroup
    model_rank: int
    model_size: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding and the vision tower."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the output layer and computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1


def initialize(device: Device, layout: Layout, seed: int) -> ParallelGroups:
    """Join the job and build the process groups. A collective of all ranks.

    Without ``reset`` in between, a second call must ask for the same layout.

    Args:
        device: this rank's device.
        layout: the parallel sizes.
        seed: seed of megatron-core's random state tracker.

    Raises:
        LayoutError: the number of processes is not a multiple of the layout's model-parallel size.
        RuntimeError: process groups of another layout exist in this process.
    """
    init_process_group(device)
    layout.data(dist.get_world_size())
    with device.megatron():
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor,
                pipeline_model_parallel_size=layout.pipeline,
                context_parallel_size=layout.context,
                # On a GPU too: get_megatron_optimizer asks for the gloo twins of parallel_state's groups.
                create_gloo_process_groups=True,
            )
        tensor_parallel.model_parallel_cuda_manual_seed(seed=seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    if (collection.tp.size(), collection.pp.size(), collection.cp.size()) != (
        layout.tensor,
        layout.pipeline,
        layout.context,
    ):
        raise RuntimeError(f"process groups of another layout than {layout} exist in this process")
    model = _model_group(layout)
    return ParallelGroups(
        collection=collection,
        data=collection.dp,
        data_rank=collection.dp.rank(),
        data_size=collection.dp.size(),
        data_context=collection.dp_cp,
        tensor=collection.tp,
        tensor_rank=collection.tp.rank(),
        tensor_size=collection.tp.size(),
        context=collection.cp,
        context_rank=collection.cp.rank(),
        context_size=collection.cp.size(),
        pipeline=collection.pp,
        pipeline_rank=collection.pp.rank(),
        pipeline_size=collection.pp.size(),
        row=collection.tp_cp,
        model=model,
        model_rank=model.rank(),
        model_size=model.size(),
    )


def reset() -> None:
    """Destroy the process groups, so that ``initialize`` can build another layout. A collective of all ranks.

    All ranks destroy them together: a layout has some twenty groups with threads and sockets of their own, and the
    threads of a gloo group spin as long as its other end is closed. Policies that used the groups must be gone.
    """
    parallel_state.destroy_model_parallel()
    _model_groups.clear()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
    dist.barrier()


_model_groups: dict[Layout, dist.ProcessGroup] = {}


def _model_group(layout: Layout) -> dist.ProcessGroup:
    """Return the group of one replica's ranks, context-parallel peers included (megatron-core's leaves them out)."""
    if layout not in _model_groups:
        mine = parallel_state.get_data_parallel_rank()
        replica_of_rank: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(replica_of_rank, mine)
        for replica in sorted(set(replica_of_rank)):
            ranks = [rank for rank, of in enumerate(replica_of_rank) if of == replica]
            group = dist.new_group(ranks)
            if replica == mine:
                _model_groups[layout] = group  # type: ignore[assignment]
    return _model_groups[layout]
