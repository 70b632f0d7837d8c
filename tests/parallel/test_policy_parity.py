# SPDX-License-Identifier: Apache-2.0
"""Claim: tensor and data parallelism do not change what the policy computes (against transformers, fp32)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import torchrun
from tests.parity import SHAPES
from tests.tiny_model import make_tiny_qwen3vl


@pytest.mark.parametrize("tensor", [2, 1], ids=["tp2", "dp2"])
def test_two_ranks_compute_what_transformers_computes(tmp_path: Path, tensor: int) -> None:
    for name, shape in SHAPES.items():
        make_tiny_qwen3vl(tmp_path / name, **shape, seed=1)
    output = torchrun(2, "-m", "tests.parallel.parity_worker", str(tmp_path), str(tensor), *SHAPES)
    for name in SHAPES:
        assert output.count(f"parity {name}:") == 2, output


@pytest.mark.full
def test_four_ranks_tensor_times_data(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        make_tiny_qwen3vl(tmp_path / name, **shape, seed=1)
    output = torchrun(4, "-m", "tests.parallel.parity_worker", str(tmp_path), "2", *SHAPES)
    for name in SHAPES:
        assert output.count(f"parity {name}:") == 4, output
