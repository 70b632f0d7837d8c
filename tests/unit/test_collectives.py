# SPDX-License-Identifier: Apache-2.0
"""What one rank raised reaches the others as an exception, and is known to be raised by all; its traceback is kept."""

from __future__ import annotations

from typing import Any

import pytest

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
