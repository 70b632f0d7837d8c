# SPDX-License-Identifier: Apache-2.0
"""Claim: over pipeline stages and tensor-parallel ranks, weights load and stream, and fail, as in one process."""

from __future__ import annotations

from tests.common.launch import torchrun


def test_four_ranks_stream_what_one_process_streams() -> None:
    output = torchrun(4, "-m", "tests.parallel.weights_pipeline_worker", timeout=200)
    for rank in range(4):
        assert f"weights agree on rank {rank}" in output, output
