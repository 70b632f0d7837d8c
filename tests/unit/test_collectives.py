# SPDX-License-Identifier: Apache-2.0
"""What one rank raised reaches the others as an exception, and is known to be raised by all; its traceback is kept. A
process that is a group of its own communicates with nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_g2rpo import collectives


class PicklesToSomethingElse(Exception):
    def __reduce__(self) -> Any:
        return dict, ()


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make this process rank 0 of 2; returns what it sent."""
    sent: list[Any] = []
    monkeypatch.setattr(collectives.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(collectives.dist, "broadcast_object_list", lambda told, group, group_src: sent.extend(told))
    return sent


def test_rank_0_raises_its_own_exception_with_its_traceback(first_of_two: list[Any]) -> None:
    def fails() -> None:
        raise PicklesToSomethingElse("no space")

    with pytest.raises(PicklesToSomethingElse, match="no space") as raised:
        collectives.from_first(fails)
    assert raised.traceback[-1].name == "fails"
    result, error = first_of_two
    assert result is None
    assert isinstance(error, RuntimeError)  # what the other rank raises
    assert str(error) == "PicklesToSomethingElse: no space"
    assert collectives.is_on_all_ranks(raised.value)


def test_an_error_that_no_collective_raised_is_one_ranks_own(first_of_two: list[Any]) -> None:
    assert not collectives.is_on_all_ranks(OSError("no space"))


def test_what_some_ranks_raise_together_is_not_known_of_all(
    first_of_two: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four ranks, in two groups."""
    group = object()
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group=None: 4 if group is None else 2)

    def fails() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space") as raised:
        collectives.from_first(fails, group=group)  # type: ignore[arg-type]
    assert not collectives.is_on_all_ranks(raised.value)


def test_of_one_process_every_error_is_of_all_ranks() -> None:
    assert collectives.is_on_all_ranks(OSError("no space"))


# -- a group of one process -------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the only one of its group, without a backend that could be called."""
    monkeypatch.setattr(collectives.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group=None: 1)


@pytest.mark.usefixtures("alone")
def test_one_process_has_what_it_asks_for() -> None:
    class Kept:
        def __reduce__(self) -> Any:
            raise AssertionError("was pickled")

    kept = Kept()
    assert collectives.gather(lambda: kept) == [kept]
    assert collectives.together(lambda: kept) is kept
    values = torch.tensor([3.0, -0.0])
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        collectives.all_reduce(values, op=op)
    assert values.tolist() == [3.0, 0.0]
    assert collectives.all_gather(values)[0] is values


@pytest.mark.usefixtures("alone")
def test_one_process_raises_what_its_function_raised() -> None:
    def fails() -> None:
        raise PicklesToSomethingElse("no space")

    with pytest.raises(PicklesToSomethingElse, match="no space") as raised:
        collectives.gather(fails)
    assert raised.traceback[-1].name == "fails"
    assert collectives.is_on_all_ranks(raised.value)


def test_ranks_of_a_group_of_several_are_called(first_of_two: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative: with the group's backend, one call each."""
    calls: list[tuple[str, Any, Any]] = []
    monkeypatch.setattr(
        collectives.dist, "all_reduce", lambda tensor, op, group: calls.append(("all_reduce", op, group))
    )
    monkeypatch.setattr(
        collectives.dist, "all_gather", lambda received, tensor, group: calls.append(("all_gather", None, group))
    )
    group: Any = object()
    collectives.all_reduce(torch.ones(2), dist.ReduceOp.MAX, group=group)
    assert len(collectives.all_gather(torch.ones(2), group=group)) == 2
    assert calls == [("all_reduce", dist.ReduceOp.MAX, group), ("all_gather", None, group)]
