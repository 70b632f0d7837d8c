# SPDX-License-Identifier: Apache-2.0
"""The device seam: the one module that knows what hardware the process runs on.

``select()`` gives everything else the torch device, the collective backend, and ``megatron()``, the context in which
megatron-core code runs. On a GPU that context does nothing. On a CPU it stands in for the few CUDA calls that
megatron-core makes unconditionally, so that the *unmodified* library runs on gloo:

- ``device="cuda"`` in factory calls, ``.cuda()``, ``.to("cuda")`` and ``pin_memory=True``: rewritten to the CPU by a
  ``TorchFunctionMode``;
- ``Tensor.type()``, which its optimizers compare with ``'torch.cuda.FloatTensor'``: answers with the CUDA name;
- ``torch.cuda.current_device`` and friends: answer with the CPU, or do nothing;
- the CUDA random state that its RNG tracker swaps: the CPU generator's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity

COLLECTIVE_TIMEOUT = timedelta(minutes=30)

# Where NVIDIA's kernel module says its version, with torch's GPU build or without.
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class DeviceError(RuntimeError):
    """The hardware that the recipe asks for is not available."""


class KernelError(DeviceError):
    """The recipe asks for kernels that the machine does not have, or for some that cannot work together."""


@dataclass(frozen=True)
class Device:
    """The hardware of this process.

    Attributes:
        kind: ``cpu`` or ``gpu``, the values of the recipe's ``cluster.device``.
        torch_device: the device of this rank's tensors.
        backend: the torch.distributed backend of collectives on that device.
    """

    kind: str
    torch_device: torch.device
    backend: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of the GPU, for example (9, 0); None on a CPU."""
        return torch.cuda.get_device_capability(self.torch_device) if self.kind == "gpu" else None

    @property
    def cuda_version(self) -> tuple[int, int] | None:
        """Version of CUDA that torch was built for; None for a CPU build."""
        if self.kind == "cpu" or torch.version.cuda is None:
            return None
        major, minor = torch.version.cuda.split(".")[:2]
        return int(major), int(minor)

    @property
    def nccl(self) -> bool:
        """Whether tensors on this device can travel over NCCL."""
        return "nccl" in self.backend

    def megatron(self) -> contextlib.AbstractContextManager[None]:
        """Return the context manager in which megatron-core is called; it is reentrant."""
        return _cpu_stands_in_for_cuda() if self.kind == "cpu" else contextlib.nullcontext()

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context manager, inside of ``megatron()``, in which a model computes its forward pass.

        A pass places no tensor on a CUDA device by name, so that nothing is to be rewritten on a CPU, where looking at
        each of its calls took a tenth of a small step. Functions of ``torch.cuda`` are still stood in for.
        """
        return torch._C.DisableTorchFunction() if self.kind == "cpu" else contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait for queued kernels, so that a wall clock that is read afterwards counts them."""
        if self.kind == "gpu":
            torch.cuda.synchronize()

    def reset_peak_memory(self) -> None:
        """Count ``peak_memory`` from here on; on a CPU it is always from the start of the process."""
        if self.kind == "gpu":
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_memory(self) -> int:
        """Return the most memory that torch has reserved on the GPU, bytes; on a CPU, that this process held."""
        if self.kind == "gpu":
            return torch.cuda.max_memory_reserved(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux

    def profiler_activities(self) -> list[ProfilerActivity]:
        """Return what a profiler records on this device."""
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.kind == "gpu" else [])]

    def record_memory_history(self, entries: int) -> None:
        """Remember this many allocations of the GPU, with their stacks, for ``dump_memory_snapshot``."""
        if self.kind == "gpu":
            torch.cuda.memory._record_memory_history(max_entries=entries)


def dump_memory_snapshot(path: Path) -> bool:
    """Write what the GPU's memory holds, and the allocations that led there, for https://docs.pytorch.org/memory_viz.

    Args:
        path: the file, a pickle.

    Returns:
        Whether there was a GPU, and the file is written.

    Raises:
        OSError: it cannot be written.
    """
    if not torch.cuda.is_initialized():
        return False
    torch.cuda.memory._dump_snapshot(str(path))
    return True


@dataclass(frozen=True)
class Hardware:
    """What the process's hardware is, for people.

    Attributes:
        name: the GPU's name; None on a CPU.
        count: number of GPUs that this process sees.
        memory: memory of one, bytes; None on a CPU.
        driver: version of NVIDIA's kernel module; None where there is none.
        cuda_version: version of CUDA that torch was built for; None for a CPU build.
        cudnn: version of cuDNN that torch loads; None on a CPU.
        nccl: version of NCCL that torch was built with; None on a CPU.
    """

    name: str | None
    count: int
    memory: int | None
    driver: str | None
    cuda_version: str | None
    cudnn: str | None
    nccl: str | None

    @property
    def virtual(self) -> bool:
        """Whether the GPU is one of host memory, which the tests make: nothing on it tells of speed or memory."""
        return self.name is not None and "(virtual)" in self.name


def hardware(device: Device) -> Hardware:
    """Return what a device is."""
    found = driver_version()
    if device.kind == "cpu":
        return Hardware(None, 0, None, found, torch.version.cuda, None, None)
    properties = torch.cuda.get_device_properties(device.torch_device)
    return Hardware(
        name=properties.name,
        count=torch.cuda.device_count(),
        memory=properties.total_memory,
        driver=found,
        cuda_version=torch.version.cuda,
        cudnn=_cudnn(torch.backends.cudnn.version()),
        nccl=".".join(map(str, torch.cuda.nccl.version())),  # pyright: ignore[reportAttributeAccessIssue] - no stub
    )


def driver_version(file: Path = _DRIVER_FILE) -> str | None:
    """Return the version of NVIDIA's kernel module, None where it is not loaded."""
    try:
        text = file.read_text()
    except OSError:
        return None
    version = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return None if version is None else version[1]


def _cudnn(number: int | None) -> str | None:
    """Version as text; the library says 91900 for 9.19.0."""
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def select(kind: str = "auto") -> Device:
    """Return the device that this rank uses.

    Args:
        kind: ``auto`` (a GPU where there is one), ``cpu`` or ``gpu``.

    Raises:
        DeviceError: ``gpu`` was asked for and torch sees none.
        ValueError: the kind is unknown.
    """
    if kind not in ("auto", "cpu", "gpu"):
        raise ValueError(f"cluster.device: {kind!r} is none of auto, cpu, gpu")
    # megatron-core's advice for tensor parallelism: kernels start in the order in which it issues them. CUDA reads it
    # when it starts, so it comes first.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    available = torch.cuda.is_available()
    if kind == "gpu" and not available:
        raise DeviceError(
            "cluster.device is 'gpu', but torch sees no GPU; set cluster.device=cpu or install a CUDA torch"
        )
    if kind == "cpu" or not available:
        return Device("cpu", torch.device("cpu"), "gloo")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    # Bookkeeping on CPU tensors (counts, rewards, metrics) goes over gloo, in the same process groups.
    return Device("gpu", torch.device("cuda", index), "cpu:gloo,cuda:nccl")


def init_process_group(device: Device) -> None:
    """Join the job's process group: torchrun's when its environment is set, otherwise a group of one process.

    The interpreter leaves it as it ends. A thread of gloo that drops the tensors of its last collective needs Python
    for it; where Python is already being finalized the process aborts: "terminate called without an active exception".
    """
    if dist.is_initialized():
        return
    atexit.unregister(_leave_process_group)
    atexit.register(_leave_process_group)
    if "RANK" in os.environ:
        dist.init_process_group(backend=device.backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(
            backend=device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
        )


def _leave_process_group() -> None:
    """Destroy what is left of the process groups, which joins the threads of gloo."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_cpu_threads(processes_per_node: int) -> None:
    """Share the node's cores among its processes; torchrun's default of one thread would leave most cores idle.

    A user's ``OMP_NUM_THREADS`` is kept, except under torchrun, which sets it itself.
    """
    if "OMP_NUM_THREADS" not in os.environ or os.environ.get("TORCHELASTIC_RUN_ID"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_per_node))


class _CudaToCpu(TorchFunctionMode):
    """Rewrites CUDA placement to the CPU in every torch call made inside."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """A stream that orders nothing: on a CPU every call has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None: ...


_STAND_INS: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "current_stream": _Stream,
    "default_stream": _Stream,
    "Stream": _Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}

_depth = 0


@contextlib.contextmanager
def _cpu_stands_in_for_cuda() -> Iterator[None]:
    """Install the stand-ins while megatron-core runs; undone on exit so that no other library meets them."""
    global _depth
    if _depth:  # reentrant: the outermost call holds the patches
        yield
        return
    from megatron.core.tensor_parallel import random as megatron_random

    patched: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in _STAND_INS.items()]
    patched.append((megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()))
    patched.append((megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    _depth += 1
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        with _CudaToCpu():
            yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
        _depth -= 1
