# SPDX-License-Identifier: Apache-2.0
"""Claim: advantages and statistics of sharded rows are those of one process, bit for bit; errors reach every rank."""

from __future__ import annotations

from tests.launch import torchrun


def test_any_split_over_one_to_three_ranks_equals_one_process() -> None:
    """Groups of 1, 2 and 3 ranks (sub-groups too), six random batches and splits, three estimators, ranks without
    rows; a reward that is not finite and rows that can't be read fail on every rank instead of hanging."""
    output = torchrun(3, "-m", "tests.parallel.sharded_advantages_worker", timeout=120)
    assert output.count("sharded advantages agree on rank") == 3, output
