# SPDX-License-Identifier: Apache-2.0
"""What each of two ranks checks of torch.distributed on CUDA tensors; started by torchrun in test_virtual_cuda.py.

Rank r holds r + 1 in its tensors, so that every result is known. Each check runs on the backend that the product asks
for, "cpu:gloo,cuda:nccl".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

CHECKS: list[Callable[[int], None]] = []


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    """Register a check, which takes the rank of this process."""
    CHECKS.append(function)
    return function


def full(value: float, *shape: int) -> torch.Tensor:
    """Make a tensor on this rank's device."""
    return torch.full(shape, float(value), device="cuda")


def same(tensor: torch.Tensor, *values: float) -> None:
    """Assert a tensor's values, exactly: they are small integers and halves."""
    assert tensor.is_cuda, tensor.device
    assert tensor.flatten().tolist() == list(values), (tensor, values)


def refused(call: Callable[[], object], message: str) -> None:
    """Assert that a call raises an error whose text has the message."""
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        call()


@check
def sums_means_and_maxima(rank: int) -> None:
    """all_reduce and reduce, with the mean that NCCL knows and gloo does not."""
    for operation, expected in ((dist.ReduceOp.SUM, 3.0), (dist.ReduceOp.AVG, 1.5), (dist.ReduceOp.MAX, 2.0)):
        tensor = full(rank + 1, 2)
        dist.all_reduce(tensor, op=operation)
        same(tensor, expected, expected)
        dist.reduce(reduced := full(rank + 1, 1), dst=1, op=operation)
        if rank == 1:
            same(reduced, expected)


@check
def bfloat16_travels(rank: int) -> None:
    """The dtype of gradients and activations."""
    tensor = full(rank + 1, 2).bfloat16()
    dist.all_reduce(tensor)
    assert tensor.dtype is torch.bfloat16
    same(tensor, 3.0, 3.0)


@check
def pieces_are_gathered_and_scattered(rank: int) -> None:
    """The collectives of sequence parallelism and the distributed optimizer, and those of lists."""
    gathered = full(0, 2)
    dist.all_gather_into_tensor(gathered, full(rank + 1, 1))
    same(gathered, 1.0, 2.0)
    for operation, factor in ((dist.ReduceOp.SUM, 1.0), (dist.ReduceOp.AVG, 0.5)):
        piece = full(0, 1)
        dist.reduce_scatter_tensor(piece, torch.tensor([1.0, 10.0], device="cuda") * (rank + 1), op=operation)
        same(piece, 3.0 * 10**rank * factor)
    parts = [full(0, 1), full(0, 1)]
    dist.all_gather(parts, full(rank + 1, 1))
    same(torch.cat(parts), 1.0, 2.0)
    dist.reduce_scatter(piece := full(0, 1), [full(rank + 1, 1), full(5, 1)])
    same(piece, (3.0, 10.0)[rank])
    dist.scatter(piece, [full(7, 1), full(8, 1)] if rank == 0 else None, src=0)
    same(piece, 7.0 + rank)
    dist.gather(piece, parts if rank == 0 else None, dst=0)
    if rank == 0:
        same(torch.cat(parts), 7.0, 8.0)
    dist.broadcast(piece, src=1)
    same(piece, 8.0)


@check
def everyone_exchanges(rank: int) -> None:
    """all_to_all of one tensor, equal and unequal pieces, and of lists, which gloo does not have."""
    output = full(0, 2)
    dist.all_to_all_single(output, torch.tensor([10.0, 20.0], device="cuda") * (rank + 1))
    same(output, *((10.0, 20.0), (20.0, 40.0))[rank])
    mine, theirs = ([1, 2], [1, 1]) if rank == 0 else ([1, 1], [2, 1])
    output = full(0, sum(theirs))
    dist.all_to_all_single(output, full(rank + 1, sum(mine)), output_split_sizes=theirs, input_split_sizes=mine)
    same(output, *([1.0, 2.0] if rank == 0 else [1.0, 1.0, 2.0]))
    received = [full(0, 1, 2), full(0, 2)]
    dist.all_to_all(received, [full(rank + 1, 1, 2) if rank == 0 else full(9, 1, 2), full(rank + 1, 2)])
    same(received[0], *((1.0, 1.0), (1.0, 1.0))[rank])
    same(received[1], *((9.0, 9.0), (2.0, 2.0))[rank])


@check
def handles_are_waited_for(rank: int) -> None:
    """Asynchronous work, whose handle NCCL lets be waited for twice, also of sends and receives."""
    work = dist.all_reduce(tensor := full(rank + 1, 3), async_op=True)
    assert work is not None
    work.wait()
    work.wait()
    same(tensor, 3.0, 3.0, 3.0)
    assert work.is_completed()
    received = full(0, 2)
    works = [dist.isend(full(rank + 1, 2), 1 - rank), dist.irecv(received, 1 - rank)]
    for work in works + works:
        assert work is not None
        work.wait()
    same(received, 2.0 - rank, 2.0 - rank)


@check
def batches_of_sends_and_receives(rank: int) -> None:
    """Pipeline and ring exchange; one handle for the batch, as of NCCL, that stands for all of it."""
    received = full(0, 2)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, full(rank + 1, 2), 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
    )
    assert len(works) == 1, "NCCL coalesces a batch"
    works[0].wait()
    same(received, 2.0 - rank, 2.0 - rank)


@check
def coalesced_collectives(rank: int) -> None:
    """What megatron-core's data parallelism starts together."""
    group = dist.group.WORLD
    sums = [full(rank + 1, 1), full(rank + 2, 1)]
    with dist._coalescing_manager(group, async_ops=True) as batch:
        for tensor in sums:
            dist.all_reduce(tensor)
    batch.wait()
    same(torch.cat(sums), 3.0, 5.0)
    pieces = [full(0, 1), full(0, 1)]
    with dist._coalescing_manager(group):
        for piece in pieces:
            dist.reduce_scatter_tensor(piece, full(rank + 1, 2))
    same(torch.cat(pieces), 3.0, 3.0)
    wholes = [full(0, 2), full(0, 2)]
    with dist._coalescing_manager(group):
        for whole in wholes:
            dist.all_gather_into_tensor(whole, full(rank + 1, 1))
    same(torch.cat(wholes), 1.0, 2.0, 1.0, 2.0)


@check
def tensors_choose_the_backend(rank: int) -> None:
    """CPU tensors go over gloo in the same group; a group of NCCL alone refuses them."""
    tensor = torch.tensor([rank + 1.0])
    dist.all_reduce(tensor)
    assert tensor.tolist() == [3.0]
    alone = dist.new_group([0, 1], backend="nccl")
    refused(lambda: dist.all_reduce(torch.ones(1), group=alone), "No backend type associated with device type cpu")
    dist.all_reduce(on_device := full(rank + 1, 1), group=alone)
    same(on_device, 3.0)
    refused(lambda: dist.all_gather_into_tensor(full(0, 2), torch.ones(1)), "Tensors must be CUDA and dense")


@check
def memory_must_be_dense(rank: int) -> None:
    """A transposed tensor is refused before anything travels, on every rank."""
    refused(lambda: dist.all_reduce(full(1, 2, 3).t()), "Tensors must be contiguous")


@check
def objects_travel(rank: int) -> None:
    """Collectives of objects, which pickle into tensors on the group's device."""
    objects: list[object] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    dist.broadcast_object_list(sent := [("rank", rank)], src=1, device=torch.device("cuda"))
    assert sent == [("rank", 1)]


@check
def barriers_end(rank: int) -> None:
    """The barrier of the device's backend."""
    dist.barrier(device_ids=[rank])


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    assert isinstance(dist.group.WORLD, dist.ProcessGroup)
    for function in CHECKS:
        function(rank)
        print(f"passed {rank} {function.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
