# SPDX-License-Identifier: Apache-2.0
"""Every rank raises what one rank raised, so that none waits for another in a collective that it never joins."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")
Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a call returned, or why it did not."""

    result: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, make: Callable[[], T], errors: Errors) -> _Outcome[T]:
        try:
            return cls(result=make())
        except errors as error:
            return cls(error=error)

    def sendable(self, result: Any) -> tuple[Any, Exception | None]:
        """The outcome as it travels; an exception that can't be pickled becomes a ``RuntimeError`` with its text."""
        error = self.error
        if error is not None:
            try:
                error = pickle.loads(pickle.dumps(error))
            except Exception:  # noqa: BLE001 (an exception's own pickling code may raise anything)
                error = RuntimeError(f"{type(error).__name__}: {error}")
        return result, error


def together(make: Callable[[], T], group: dist.ProcessGroup | None = None, errors: Errors = (Exception,)) -> T:
    """Call ``make`` on every rank of a group; what it returned on this one. A collective.

    Args:
        make: called on every rank.
        group: the ranks; None for all of them.
        errors: what is told to the others. Anything else leaves this rank at once.

    Raises:
        Exception: on every rank, what ``make`` raised on the first rank where it did; this rank's own comes first.
    """
    outcome = _Outcome.of(make, errors)
    _gather(outcome, None, group)
    return outcome.result  # type: ignore[return-value]  # without an error there is a result


def gather(make: Callable[[], T], group: dist.ProcessGroup | None = None, errors: Errors = (Exception,)) -> list[T]:
    """Call ``make`` on every rank of a group; what it returned on each, in the order of the ranks. A collective.

    Args, raises: see ``together``; the results are pickled.
    """
    outcome = _Outcome.of(make, errors)
    return _gather(outcome, outcome.result, group)


def from_first(make: Callable[[], T], errors: Errors = (Exception,)) -> T:
    """Call ``make`` on rank 0; what it returned, or raised, on every rank of the job. A collective.

    Outside of a job of several processes this is the call alone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = _Outcome.of(make, errors)
        told = list(outcome.sendable(outcome.result))
    dist.broadcast_object_list(told, src=0)
    result, error = told
    if error is not None:
        raise error
    return result


def _gather(outcome: _Outcome[Any], result: Any, group: dist.ProcessGroup | None) -> list[Any]:
    received: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(received, outcome.sendable(result), group=group)
    if outcome.error is not None:
        raise outcome.error
    for _, error in received:
        if error is not None:
            raise error
    return [value for value, _ in received]
