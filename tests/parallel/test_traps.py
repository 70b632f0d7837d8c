# SPDX-License-Identifier: Apache-2.0
"""Claims: mistakes that need several ranks are rejected, or detected by the parity tests; hard inputs are correct.

One launch makes all of them, layout after layout. The tests name them; ``traps_worker.py`` says where each was met.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.traps import MARGIN, TOLERANCES, Baseline
from tests.parallel.traps_worker import LAYOUTS, TRAPS, Trap

# Of one rank: trap -> the worst errors, or what was said when it was rejected.
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    directory = tmp_path_factory.mktemp("traps")
    Baseline.make(directory).save()
    return torchrun_json(2, "tests.parallel.traps_worker", str(directory))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_mistake_every_error_is_within_tolerance(results: list[Results], layout: str) -> None:
    for result in results:
        Report(TOLERANCES, **result[layout]).assert_within_tolerance()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap(results: list[Results], trap: Trap) -> None:
    for result in (result[trap.name] for result in results):
        print(result)
        if trap.rejected is not None:
            assert trap.rejected in result["rejected"]
        elif trap.detected:
            Report(TOLERANCES, **result).assert_exceeded(*trap.detected, margin=MARGIN)
        else:
            Report(TOLERANCES, **result).assert_within_tolerance()
