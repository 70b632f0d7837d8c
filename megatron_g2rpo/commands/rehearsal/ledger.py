# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all tensors that are alive, and the messages of all collectives, op by op."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rpo.commands.rehearsal.tensors import tensors_in

# torch's operator -> the collective, and which argument holds the whole payload.
_COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all-to-all", 0),
    "alltoall_": ("all-to-all", 0),
    "send": ("send", 0),
    # Several messages in one call.
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}
_UNCOUNTED = ("recv_", "barrier", "monitored_barrier_")  # a receive is the peer's send; a barrier has no payload


@dataclass(frozen=True)
class Message:
    """One kind of message.

    Attributes:
        collective: name of the collective, as ``plan.wire`` calls it.
        group: torch's name of the process group.
        ranks: number of ranks of the group.
        payload: bytes of the whole tensor: of an all-gather's result, of a reduce-scatter's operand.
    """

    collective: str
    group: str
    ranks: int
    payload: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, with ring algorithms as in ``plan.wire``."""
        share = (self.ranks - 1) / self.ranks
        return self.payload * {"all-reduce": 2 * share, "send": 1.0}.get(self.collective, share)


class Ledger(TorchDispatchMode):
    """The ledger of what runs while it is entered.

    Storages are counted once, from the op that makes them until nothing holds them any more. What a kernel allocates
    and frees within itself is not seen.

    Attributes:
        held: bytes of the storages that are alive.
        peak: most bytes that were held at once since ``restart``.
        messages: messages to groups of more than one rank -> how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.messages: Counter[Message] = Counter()
        self._alive: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's guard against being compiled, a tenth of a rehearsal's time; nothing is.
        return False

    def restart(self) -> None:
        """Let the peak begin at what is held now."""
        self.peak = self.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._note(func, args)
            if "coalesced" in func.name():
                return FakeWork().boxed()  # torch has no fake implementation; all that these return is when it is done
        results = func(*args, **(kwargs or {}))
        for result in tensors_in((results,)):
            self._hold(result)
        return results

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._alive:
            return
        self._alive.add(key)
        weakref.finalize(storage, self._release, key, size).atexit = False
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func.name().removeprefix("c10d::").split(".")[0]
        if name in _UNCOUNTED:
            return
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"a rehearsal does not know the collective {name}: add it to commands.rehearsal")
        collective, whole = _COLLECTIVES[name]
        [boxed] = [value for value in args if isinstance(value, torch.ScriptObject)][:1]
        group = dist.ProcessGroup.unbox(boxed)
        sizes = [tensor.nbytes for tensor in tensors_in((args[whole],))]
        for payload in sizes if "coalesced" in name else [sum(sizes)]:
            if group.size() > 1 and payload:
                self.messages[Message(collective, group.group_name, group.size(), payload)] += 1
