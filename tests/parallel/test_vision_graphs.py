# SPDX-License-Identifier: Apache-2.0
"""Claim: two data-parallel ranks learn through their own generation's passes of the tower what transformers computes.

The ranks have different images, and their gradients are summed after each has taken its own through the tower.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.traps import TOLERANCES, Baseline

MODES = ["plain", "distributed"]


@pytest.mark.timeout(600)
def test_two_data_parallel_ranks_compute_the_gradients_of_transformers(tmp_path: Path) -> None:
    Baseline.make(tmp_path).save()
    results = torchrun_json(2, "tests.parallel.vision_graphs_worker", str(tmp_path), *MODES, timeout=600)
    for rank in results:
        assert list(rank) == MODES
        for found in rank.values():
            Report(TOLERANCES, found["worst"]).assert_within_tolerance()
            assert found["later"] == 0, "neither log-probabilities nor updates ran the tower"
    assert sum(rank["plain"]["generated"] for rank in results) > 0
