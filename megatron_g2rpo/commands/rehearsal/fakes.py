# SPDX-License-Identifier: Apache-2.0
"""What stands in for a cluster in a rehearsal: tensors without memory, and process groups without processes.

Weights, gradients and activations are torch's fake tensors: shape, dtype and strides, no values. Index tensors (token
ids, labels, offsets, image grids) keep their values, because code reads sizes from them. Nothing of this is installed
outside of ``fake_world`` and ``without_values``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from megatron_g2rpo.commands.rehearsal.tensors import tensors_in
from megatron_g2rpo.policy import process_groups

# An op on values whose result has more elements gives a fake tensor: masks of long rows, which nobody reads.
MOST_REAL_ELEMENTS = 1 << 24

# Factories whose results are numbers that code reads, whatever their dtype: patch positions, rotary frequencies.
_SEQUENCES = ("aten::arange", "aten::linspace", "aten::scalar_tensor")


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world in which collectives return at once and leave their tensors as they are.

    Args:
        rank: the global rank to be.
        world_size: number of ranks.

    Raises:
        RuntimeError: this process has joined a job already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rehearsal needs a process of its own: this one has joined a job")
    new_group = dist.new_group

    def fake_group(*arguments: Any, backend: Any = None, **keywords: Any) -> Any:
        # megatron-core asks for twins of its groups on a real backend, which would wait for real peers.
        return new_group(*arguments, **keywords)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with _replaced(dist, "new_group", fake_group):
            yield
    finally:
        process_groups.reset()
        dist.destroy_process_group()


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Let every floating-point tensor made inside be fake, and index tensors real."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from megatron_g2rpo.policy.model import PolicyModel

    def fork(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the tracker compares random states by value; nothing here is random

    with (
        _replaced(CudaRNGStatesTracker, "fork", fork),
        # Everything is on the CPU as it is made, and torch cannot exchange fake parameters that something refers to.
        _replaced(PolicyModel, "to", lambda model, *_, **__: model),
        _replaced(distributed_c10d, "_object_to_tensor", _real(distributed_c10d._object_to_tensor)),
        FakeTensorMode(allow_non_fake_inputs=True) as fake_mode,
        _RealIndices(fake_mode),
    ):
        yield


class _RealIndices(TorchDispatchMode):
    """Runs ops without a fake operand for real, and leaves all others to the fake mode beneath."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self._fake_mode = fake_mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's guard against being compiled, a tenth of a rehearsal's time; nothing is.
        return False

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake_mode.from_tensor(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # what half of all ops ask
            return func(*args, **kwargs)
        tensors = list(tensors_in(args))
        if kwargs:
            tensors += tensors_in(kwargs.values())
        fake = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fake and fake == len(tensors):
            return func(*args, **kwargs)
        if fake:
            # Converted here and not beneath: what the fake mode converts itself, it does not cache.
            return func(*tree_map_only(Tensor, self._fake, args), **tree_map_only(Tensor, self._fake, kwargs))
        if tensors:
            real = _elements(tensors) <= MOST_REAL_ELEMENTS
        else:
            dtype = kwargs.get("dtype")
            real = func.name().split(".")[0] in _SEQUENCES or (dtype is not None and not dtype.is_floating_point)
        if not real:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _real(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with tensors that have values: it turns Python objects into bytes."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with unset_fake_temporarily(), _disable_current_modes():
            return function(*arguments, **keywords)

    return call


def _elements(tensors: list[Tensor]) -> int:
    """Return the number of elements of an elementwise result, or else of the largest operand."""
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:
        return max(tensor.numel() for tensor in tensors)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
