# SPDX-License-Identifier: Apache-2.0
"""What one rank raised reaches the others as an exception, and keeps its traceback where it was raised."""

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
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group: 2)
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
