# SPDX-License-Identifier: Apache-2.0
"""Claim: advantages, statistics and history of sharded rows are those of one process, bit for bit; errors reach every
rank."""

from __future__ import annotations

from tests.common.launch import torchrun_json
from tests.parallel.sharded_advantages_worker import GROUPS


def test_any_split_over_one_to_four_ranks_equals_one_process() -> None:
    """Groups of 1 to 4 ranks (sub-groups too), every registered estimator with components over two steps with a
    history, six batches split over the ranks at random, ranks without rows; values that are not finite, rows that
    can't be read and components that differ fail on every rank instead of hanging."""
    checked = torchrun_json(4, "tests.parallel.sharded_advantages_worker", timeout=180)
    assert checked == [[members for members in GROUPS if rank in members] for rank in range(4)]
