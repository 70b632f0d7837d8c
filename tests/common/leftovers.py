# SPDX-License-Identifier: Apache-2.0
"""What a test must not leave to those after it in its process; a ``conftest.py`` that imports the fixture has it hold.

A process that is left behind ends with pytest, so nobody sees it, until a test counts processes or a pipe stays open.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail a test that ends with processes which ``multiprocessing`` started in it, and name them."""
    before = set(multiprocessing.active_children())  # those of fixtures of a wider scope
    yield
    left = [process.name for process in multiprocessing.active_children() if process not in before]
    assert not left, f"the test leaves processes behind: {', '.join(left)}"
