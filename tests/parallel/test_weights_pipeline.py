# SPDX-License-Identifier: Apache-2.0
"""Claim: over pipeline stages and tensor-parallel ranks, weights load and stream, and fail, as in one process."""

from __future__ import annotations

from tests.common.launch import torchrun_json
from tests.parallel.weights_pipeline_worker import LAYOUTS


def test_four_ranks_stream_what_one_process_streams() -> None:
    """Every layout, tied and untied; of each rank, the layouts that it has checked."""
    checked = [[list(stage_layers), tensor_size] for stage_layers, tensor_size in LAYOUTS]
    assert torchrun_json(4, "tests.parallel.weights_pipeline_worker", timeout=200) == [checked] * 4
