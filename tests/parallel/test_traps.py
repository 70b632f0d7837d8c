# SPDX-License-Identifier: Apache-2.0
"""Claims: mistakes that need several ranks are refused, or seen by the parity tests; inputs that are hard are right.

One launch makes all of them, layout after layout. The tests name them; ``traps_worker.py`` says where each was met.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.common.launch import torchrun
from tests.common.traps import Errors, Scene
from tests.parallel.traps_worker import LAYOUTS, TRAPS, Trap


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Trap -> the worst errors, or what was said when it was refused."""
    directory: Path = tmp_path_factory.mktemp("traps")
    Scene.make(directory).save()
    torchrun(2, "-m", "tests.parallel.traps_worker", str(directory))
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_mistake_nothing_is_seen(results: dict[str, dict[str, Any]], layout: str) -> None:
    Errors(**results[layout]).assert_none()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap(results: dict[str, dict[str, Any]], trap: Trap) -> None:
    result = results[trap.name]
    print(result)
    if trap.refused is not None:
        assert trap.refused in result["refused"]
    elif trap.seen:
        Errors(**result).assert_seen(*trap.seen)
    else:
        Errors(**result).assert_none()
