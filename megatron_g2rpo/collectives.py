# SPDX-License-Identifier: Apache-2.0
"""Collective calls of functions and tensors.

Every rank raises what one rank raised in a function, so that no rank waits for one that has failed.

A process that is a group of its own has what it asks for: it communicates with nobody, neither through pickles nor
through a backend, whose call costs a fifth of a millisecond even then (gloo, on one core).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Errors = tuple[type[Exception], ...]
E = TypeVar("E", bound=BaseException)

_ON_ALL_RANKS = "_raised_on_all_ranks"


def on_all_ranks(error: E) -> E:
    """Mark an error that every rank of the job raises at the same place, and return it.

    After one, and after no other, ranks may still call collectives. What ``together``, ``gather`` and ``from_first``
    raise for all ranks is marked; what they raise for some may be marked by a caller that knows of the others.
    """
    setattr(error, _ON_ALL_RANKS, True)
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Return whether an error is known to be raised by every rank of the job, see ``on_all_ranks``.

    In a job of one process every error is.
    """
    return getattr(error, _ON_ALL_RANKS, False) or not dist.is_initialized() or dist.get_world_size() == 1


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """The outcome of a call: what it returned, or what it raised."""

    result: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, make: Callable[[], T], errors: Errors) -> _Outcome[T]:
        try:
            return cls(result=make())
        except errors as error:
            return cls(error=error)

    def sendable(self, result: Any) -> tuple[Any, Exception | None]:
        """Return the outcome in a form that can be sent.

        An exception that cannot be pickled becomes a ``RuntimeError`` with its text.
        """
        error = self.error
        if error is not None:
            try:
                copy = pickle.loads(pickle.dumps(error))
                if not isinstance(copy, Exception):
                    raise TypeError(f"pickled to {type(copy).__name__}")
                error = copy
            except Exception:  # noqa: BLE001 (an exception's own pickling code may raise anything)
                error = RuntimeError(f"{type(error).__name__}: {error}")
        return result, error


def together(make: Callable[[], T], group: dist.ProcessGroup | None = None, errors: Errors = (Exception,)) -> T:
    """Call ``make`` on every rank of a group, and return what it returned on this rank. A collective.

    Args:
        make: function that is called on every rank.
        group: process group of the ranks; None for all ranks.
        errors: exceptions that are sent to the other ranks. Any other exception is raised on this rank at once.

    Raises:
        Exception: ``make`` raised one of ``errors`` on some rank. A rank on which it raised gets its own exception; the
            others get the exception of the first rank where it did.
    """
    outcome = _Outcome.of(make, errors)
    _gather(outcome, None, group)
    return outcome.result  # type: ignore[return-value]  # without an error there is a result


def gather(make: Callable[[], T], group: dist.ProcessGroup | None = None, errors: Errors = (Exception,)) -> list[T]:
    """Call ``make`` on every rank of a group, and return the results of all ranks in their order. A collective.

    Arguments and exceptions are those of ``together``. The results must be picklable; the one of a group of one process
    is returned itself.
    """
    outcome = _Outcome.of(make, errors)
    return _gather(outcome, outcome.result, group)


def from_first(make: Callable[[], T], errors: Errors = (Exception,), *, group: dist.ProcessGroup | None = None) -> T:
    """Call ``make`` on the first rank of a group; what it returned, or raised, on every rank of it. A collective.

    In a group of one process, and outside of a job of several, this only calls ``make``.

    Args:
        make: function to call; its result is pickled.
        errors: exceptions that the other ranks are told of. Anything else leaves the first rank at once.
        group: the ranks; None for all of them.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return make()
    told: list[Any] = [None, None]
    outcome: _Outcome[T] | None = None
    if dist.get_rank(group) == 0:
        outcome = _Outcome.of(make, errors)
        told = list(outcome.sendable(outcome.result))
    dist.broadcast_object_list(told, group=group, group_src=0)
    if outcome is not None and outcome.error is not None:
        raise _marked(outcome.error, group)  # its own, with its traceback
    result, error = told
    if error is not None:
        raise _marked(error, group)
    return result


def all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, *, group: dist.ProcessGroup | None = None
) -> None:
    """Reduce a tensor over the ranks of a group, in place. A collective.

    Args:
        tensor: of equal shape and dtype on all ranks, each of which gets the result.
        op: how it is reduced; each of them leaves the tensor of one rank as it is.
        group: the ranks; None for all of them.
    """
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)


def all_gather(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the tensors of all ranks of a group in their order. A collective.

    Args:
        tensor: of equal shape and dtype on all ranks; in a group of one process it is what is returned, not a copy.
        group: the ranks; None for all of them.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return [tensor]
    received = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(received, tensor, group=group)
    return received


def _gather(outcome: _Outcome[Any], result: Any, group: dist.ProcessGroup | None) -> list[Any]:
    size = dist.get_world_size(group)
    received: list[Any] = [(result, None)]
    if size > 1:
        received = [None] * size
        dist.all_gather_object(received, outcome.sendable(result), group=group)
    if outcome.error is not None:
        raise _marked(outcome.error, group)
    for _, error in received:
        if error is not None:
            raise _marked(error, group)
    return [value for value, _ in received]


def _marked(error: Exception, group: dist.ProcessGroup | None) -> Exception:
    """An error that all ranks of a group raise, marked if the group is the whole job."""
    return on_all_ranks(error) if dist.get_world_size(group) == dist.get_world_size() else error
