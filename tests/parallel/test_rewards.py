# SPDX-License-Identifier: Apache-2.0
"""Claim: which rollouts have no reward, and what that does to the others, depends on no layout; a replica asks once."""

from __future__ import annotations

from tests.common.launch import torchrun_json
from tests.parallel.rewards_worker import FAILING, GROUPS, SAMPLES


def test_failed_rewards_are_the_same_on_two_ranks() -> None:
    first, second = torchrun_json(2, "tests.parallel.rewards_worker")
    for rank in (first, second):
        assert rank["spread"] == rank["whole"] == first["whole"]
        assert rank["whole"]["scored"] == GROUPS * SAMPLES
        assert len(rank["whole"]["failed"]) == len(FAILING)
        assert rank["same"], "advantages of the global batch without what failed, bit for bit"
        failing = [(place // SAMPLES, place % SAMPLES) in FAILING for place in range(GROUPS * SAMPLES)]
        assert rank["replica"]["failed"] == failing
        assert rank["replica"]["pid"] == [-1.0 if failed else float(first["pid"]) for failed in failing]
        assert "5 rewards, more than env.max_failed_rewards allows" in rank["error"], "of the second rank, on both"
        assert rank["known"], "which is what lets them give a checkpoint its name before they end"
    assert first["replica"]["calls"] == GROUPS * SAMPLES
    assert second["replica"]["calls"] == 0
