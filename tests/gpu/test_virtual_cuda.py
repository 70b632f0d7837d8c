# SPDX-License-Identifier: Apache-2.0
"""Claims: the virtual device is strict where a GPU is, and remembers what a GPU remembers.

What passes on it can then be trusted not to mix devices, not to lose a random state, not to wait for the device unseen.
Each test names the mistake in a program that it stands for: the device that does not notice it would pass it on.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.common.launch import torchrun
from tests.gpu.devices import needs_cuda, needs_virtual
from tests.gpu.virtual_cuda import counted_synchronisations
from tests.gpu.virtual_nccl_worker import CHECKS

pytestmark = [needs_cuda, pytest.mark.without_transformer_engine]  # the device is the same beside it


def _device(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


# -- where operands are --------------------------------------------------------------------------------------------

# One operand on the CPU beside one on the device, as a program has that forgot to move a mask, an index or a target.
# The device comes first in each.
MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda device, cpu: device + cpu,
    "matmul": lambda device, cpu: device @ cpu,
    "cat": lambda device, cpu: torch.cat([device, cpu]),
    "stack": lambda device, cpu: torch.stack([cpu, device]),
    "masked_fill": lambda device, cpu: device.masked_fill(cpu > 0, 1.0),
    "where condition": lambda device, cpu: torch.where(cpu > 0, device, device),
    "where value": lambda device, cpu: torch.where(device > 0, device, cpu),
    "index_select": lambda device, cpu: device.index_select(0, cpu[0].long()),
    "index_select with one index": lambda device, cpu: device.index_select(0, torch.tensor(0)),
    "embedding": lambda device, cpu: torch.nn.functional.embedding(cpu.long(), device),
    "gather": lambda device, cpu: device.gather(0, cpu.long()),
    "scatter": lambda device, cpu: device.scatter(0, cpu.long(), 1.0),
    "index_add": lambda device, cpu: device.index_add(0, torch.tensor([0, 1]), device),
    "index_put value": lambda device, cpu: device.index_put((torch.tensor([0]),), cpu[0]),
    "a CPU tensor by an index on the device": lambda device, cpu: cpu[device[0].long()],
    "layer_norm": lambda device, cpu: torch.nn.functional.layer_norm(device, (2,), cpu[0]),
    "linear": lambda device, cpu: torch.nn.functional.linear(device, cpu),
    "cross_entropy": lambda device, cpu: torch.nn.functional.cross_entropy(device, cpu[0].long()),
    "foreach": lambda device, cpu: torch._foreach_add([device], [cpu]),
    "lerp": lambda device, cpu: device.lerp(cpu, 0.5),
    "out": lambda device, cpu: torch.add(device, device, out=cpu),
    "out of one number": lambda device, cpu: torch.add(device[0, 0], 1.0, out=torch.tensor(0.0)),
    "two devices": lambda device, cpu: device + cpu.to("cuda:1"),
    "a number on another device": lambda device, cpu: device + cpu.to("cuda:1").sum(),
    "the storage of a CPU tensor": lambda device, cpu: device.set_(cpu.untyped_storage()),
}


@pytest.mark.parametrize("name", MIXED)
@needs_virtual
def test_operands_that_are_not_on_one_device_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|different device|indices should be"):
        MIXED[name](_device(2, 2), torch.ones(2, 2))


def test_numbers_and_indices_of_the_cpu_are_taken() -> None:
    """Otherwise code that is right on a GPU would fail here: a learning rate in a tensor, an index list."""
    device = _device(3)
    assert (device + torch.tensor(2.0)).tolist() == [3.0] * 3
    assert device.masked_fill(device > 0, torch.tensor(5.0)).tolist() == [5.0] * 3
    assert torch.where(device > 0, device, torch.tensor(0.0)).tolist() == [1.0] * 3
    assert device[torch.tensor([2])].is_cuda
    assert device.index_put((torch.tensor([1]),), torch.tensor(4.0)).tolist() == [1.0, 4.0, 1.0]
    assert torch.ones(3).copy_(device).is_cpu
    assert device.copy_(torch.full((3,), 7.0)).tolist() == [7.0] * 3


@needs_virtual
def test_an_operator_that_refuses_says_its_name_and_the_argument() -> None:
    with pytest.raises(RuntimeError, match=r"aten::index_select.*cuda:0 and cpu.*\(argument index\)"):
        _device(2).index_select(0, torch.tensor([0]))


def test_results_are_on_the_device_and_views_share_its_memory() -> None:
    """A view that were a copy would lose what is written to it."""
    device = torch.zeros(4, device="cuda")
    for view in (device[1:], device.view(2, 2), device.view(torch.int32), device.unfold(0, 2, 1), device.detach()):
        assert view.is_cuda
        assert view.untyped_storage().data_ptr() == device.untyped_storage().data_ptr()
    device.unfold(0, 2, 2)[1].fill_(3.0)
    assert device.tolist() == [0.0, 0.0, 3.0, 3.0]
    grown = torch.add(device, 1.0, out=torch.empty(0, device="cuda"))
    assert grown.is_cuda
    assert grown.tolist() == [1.0, 1.0, 4.0, 4.0]


@needs_virtual
def test_a_tensor_is_on_one_of_several_devices() -> None:
    """A rank that forgot set_device uses rank 0's GPU; a program that takes cuda:1's tensor for cuda:0's is wrong."""
    assert torch.cuda.device_count() == 8
    before = torch.cuda.current_device()
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").get_device() == 1
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == before
    source = _device(3)
    other = source.to("cuda:1")
    assert other.device == torch.device("cuda", 1)
    source.zero_()
    assert other.tolist() == [1.0] * 3, "a copy, not an alias"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(8)
    weight = torch.ones(3, device="cuda:2", requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.get_device() == 2


@needs_virtual
def test_memory_that_was_not_written_is_not_a_number() -> None:
    """A GPU hands out what others left behind; zeros would hide a buffer that nobody filled."""
    assert torch.empty(3, device="cuda").isnan().all()
    assert torch.empty(3, device="cuda", dtype=torch.bfloat16).isnan().all()
    assert torch.zeros(3, device="cuda").tolist() == [0.0] * 3


# -- moving and saving ---------------------------------------------------------------------------------------------


def test_tensors_are_loaded_where_they_were_or_where_they_are_asked_for() -> None:
    saved = io.BytesIO()
    whole = torch.arange(6.0, device="cuda")
    torch.save({"whole": whole, "view": whole[2:4], "cpu": torch.ones(2)}, saved)

    def load(location: str | None) -> dict[str, Tensor]:
        saved.seek(0)
        return torch.load(saved, map_location=location)

    same, host, device = load(None), load("cpu"), load("cuda:0")
    assert [same[name].device.type for name in ("whole", "view", "cpu")] == ["cuda", "cuda", "cpu"]
    assert all(tensor.is_cpu for tensor in host.values())
    assert all(tensor.is_cuda for tensor in device.values())
    assert device["view"].tolist() == [2.0, 3.0]
    assert device["view"].untyped_storage().data_ptr() == device["whole"].untyped_storage().data_ptr()


def test_storages_and_pickles_keep_the_device() -> None:
    device = torch.arange(3.0, device="cuda")
    assert torch.UntypedStorage(8, device="cuda").device.type == "cuda"
    assert torch.arange(3.0).untyped_storage().cuda().device.type == "cuda"
    assert device.untyped_storage().cpu().device.type == "cpu"
    for again in (pickle.loads(pickle.dumps(device)), copy.deepcopy(device)):
        assert again.is_cuda
        assert again.tolist() == [0.0, 1.0, 2.0]
        assert again.data_ptr() != device.data_ptr()


def test_pinned_memory_says_that_it_is() -> None:
    pinned = torch.ones(4).pin_memory()
    for memory in (pinned, pinned[2:], torch.empty(3, pin_memory=True)):
        assert memory.is_pinned()
    assert not torch.ones(4).is_pinned()
    assert pinned.to("cuda", non_blocking=True).is_cuda


# -- randomness ----------------------------------------------------------------------------------------------------


def _draws() -> list[Tensor]:
    """Draw in three ways: with a generator's argument, without one, and by a factory."""
    dropped = torch.nn.functional.dropout(_device(64), 0.5)
    return [torch.rand(3, device="cuda"), dropped, torch.randperm(9, device="cuda")]


def test_the_device_draws_from_generators_of_its_own() -> None:
    """A checkpoint that saves the CPU's state only would otherwise seem to resume exactly."""
    torch.manual_seed(0)
    torch.cuda.manual_seed(5)
    host = torch.get_rng_state()
    state = torch.cuda.get_rng_state()
    draws = _draws()
    assert torch.equal(torch.get_rng_state(), host), "the device's draws leave the CPU's generator alone"
    assert not torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(5)
    torch.cuda.set_rng_state(state)
    assert all(torch.equal(first, second) for first, second in zip(draws, _draws(), strict=True))
    torch.cuda.set_rng_state(state)
    assert not torch.equal(torch.rand(3, device="cuda"), torch.rand(3, device="cuda"))


@needs_virtual
def test_every_device_has_its_own_generator() -> None:
    torch.cuda.manual_seed_all(3)
    other = torch.cuda.get_rng_state(1)
    torch.rand(2, device="cuda:0")
    assert torch.equal(torch.cuda.get_rng_state(1), other)
    assert torch.cuda.default_generators[1].initial_seed() == 3
    with pytest.raises(RuntimeError, match=r"cuda:1.*cannot draw on cuda:0"):
        torch.rand(2, device="cuda:0", generator=torch.Generator("cuda:1"))


def test_a_generator_belongs_to_a_device() -> None:
    one, two = (torch.Generator("cuda").manual_seed(7) for _ in range(2))
    assert torch.equal(torch.rand(4, device="cuda", generator=one), torch.rand(4, device="cuda", generator=two))
    assert one.get_state().numel() == 16, "a seed and an offset, as of CUDA's Philox"
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(4, device="cuda", generator=torch.Generator())


def test_recomputation_repeats_the_random_numbers_of_the_forward_pass() -> None:
    masks: list[Tensor] = []

    def layer(inputs: Tensor) -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(inputs), 0.5)
        masks.append(mask.detach())
        return inputs * mask

    for preserve in (True, False):
        masks.clear()
        inputs = torch.ones(256, device="cuda", requires_grad=True)
        outputs = checkpoint(layer, inputs, use_reentrant=False, preserve_rng_state=preserve)
        assert isinstance(outputs, Tensor)
        outputs.sum().backward()
        assert torch.equal(*masks) is preserve, "without the state that is kept the masks differ"


def test_megatrons_tracker_gives_each_name_its_own_numbers() -> None:
    """Tensor-parallel ranks must differ inside the fork, and agree outside of it."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("model", 2)
    outside = torch.cuda.get_rng_state()
    with tracker.fork("model"):
        first = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), outside)
    with tracker.fork("model"):
        second = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(2)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    assert not torch.equal(first, second)


# -- memory, streams, events ---------------------------------------------------------------------------------------


@needs_virtual
def test_memory_counts_the_bytes_of_storages_that_live() -> None:
    with torch.cuda.device(3):
        assert torch.cuda.memory_allocated() == 0
        made = torch.empty(1000, device="cuda")
        result = made * 2
        view = result[10:].view(torch.int32)
        assert torch.cuda.memory_allocated() == 8000, "results count, views do not"
        del result
        assert torch.cuda.memory_allocated() == 8000, "a view keeps the storage"
        del made, view
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.max_memory_allocated() == 8000
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0
        free, total = torch.cuda.mem_get_info()
        assert free == total == torch.cuda.get_device_properties(3).total_memory
        grown = torch.zeros(10, device="cuda").resize_(100)
        assert torch.cuda.memory_allocated() == 400
        torch.add(torch.ones(200, device="cuda"), 1.0, out=grown)
        assert torch.cuda.memory_allocated() == 800
    assert torch.cuda.memory_allocated(4) == 0


def test_streams_know_their_device_and_are_the_current_one_in_their_block() -> None:
    stream = torch.cuda.Stream()
    assert isinstance(stream, torch.Stream)
    assert stream != torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        _device(2).record_stream(stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert stream.device == torch.device("cuda", torch.cuda.current_device())


@needs_virtual
def test_a_stream_of_another_device_says_so() -> None:
    assert torch.cuda.Stream(device=2).device == torch.device("cuda", 2)
    assert torch.cuda.current_device() == 0


def test_events_measure() -> None:
    """A timer that answers zero would make a throughput infinite."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises((ValueError, RuntimeError)):
        start.elapsed_time(end)
    start.record()
    torch.ones(300, 300, device="cuda").matmul(torch.ones(300, 300, device="cuda"))
    end.record()
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0


@needs_virtual
def test_a_fork_of_a_process_that_uses_cuda_may_not() -> None:
    """A data loader's worker that touches the device fails on a GPU."""
    program = """
import os, torch
torch.ones(1, device="cuda")
if os.fork() == 0:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        os._exit("Cannot re-initialize CUDA in forked subprocess" not in str(error))
    os._exit(2)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@needs_virtual
def test_a_process_without_its_device_does_not_start(tmp_path: Path) -> None:
    """Python passes over an error of sitecustomize: the tests would then run on a CPU, and say nothing of it."""
    (tmp_path / "_virtual_cuda.so").write_bytes(b"not a library")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", "print('started')"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not done.stdout


@needs_virtual
def test_the_name_says_that_it_is_virtual() -> None:
    assert "(virtual)" in torch.cuda.get_device_name()
    assert torch.cuda.get_device_capability() == (9, 0)


# -- waits of the host ---------------------------------------------------------------------------------------------

WAITS: dict[str, tuple[Callable[[Tensor], object], dict[str, int]]] = {
    "item": (lambda device: device.sum().item(), {"aten::_local_scalar_dense": 1}),
    "a condition": (lambda device: bool((device > 0).all()), {"aten::_local_scalar_dense": 1}),
    "tolist": (lambda device: device.tolist(), {"aten::copy_ (device to host)": 1}),
    "cpu": (lambda device: device.cpu(), {"aten::copy_ (device to host)": 1}),
    "a tensor of a list": (lambda device: torch.tensor([1], device="cuda"), {"aten::copy_ (host to device)": 1}),
    "nonzero": (lambda device: device.nonzero(), {"aten::nonzero": 1}),
    "reading by a mask": (lambda device: device[device > 0], {"aten::nonzero": 1}),
    "masked_select": (lambda device: device.masked_select(device > 0), {"aten::masked_select": 1}),
    "writing by a mask": (
        lambda device: device.clone().__setitem__(device > 0, device),
        {"aten::_index_put_impl_ (mask)": 1},
    ),
    "unique": (lambda device: device.unique(), {"aten::_unique2": 1}),
    "synchronize": (lambda device: torch.cuda.synchronize(), {"torch.cuda.synchronize": 1}),
    "a stream": (lambda device: torch.cuda.current_stream().synchronize(), {"Stream.synchronize": 1}),
    "filling by a mask": (lambda device: device.clone().__setitem__(device > 0, 1.0), {}),
    "a copy that does not block": (lambda device: torch.ones(2).to("cuda", non_blocking=True), {}),
    "arithmetic": (lambda device: (device @ device + 1).sum(), {}),
    "repeats of a size that is told": (lambda device: device.repeat_interleave(device.long(), output_size=2), {}),
}


@pytest.mark.parametrize("name", WAITS)
@needs_virtual
def test_waits_are_counted_by_operator(name: str) -> None:
    call, expected = WAITS[name]
    device = _device(2)
    with counted_synchronisations() as counts:
        call(device)
    assert counts == expected


@needs_virtual
def test_waits_name_the_line_and_stop_being_counted() -> None:
    device = _device(2)
    with counted_synchronisations(within="test_virtual_cuda") as counts:
        device.sum().item()
        device.cpu()
    device.cpu()
    assert sum(counts.values()) == 2
    assert all("test_virtual_cuda.py:" in where for where in counts)


@needs_virtual
def test_torchs_own_debug_mode_refuses_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            _device(2).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- collectives ---------------------------------------------------------------------------------------------------


@needs_virtual
def test_two_ranks_meet_over_nccl() -> None:
    """The checks are in the worker, each with the values that it expects; every rank must have come to the last."""
    path = os.environ["PYTHONPATH"]  # by which the ranks have the device, too
    output = torchrun(2, "-m", "tests.gpu.virtual_nccl_worker", timeout=240, PYTHONPATH=path)
    passed = re.findall(r"passed (\d) (\w+);", output)
    assert sorted(passed) == sorted((rank, each.__name__) for rank in "01" for each in CHECKS)
