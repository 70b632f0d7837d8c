# SPDX-License-Identifier: Apache-2.0
"""Claim: in tensor-, sequence-, pipeline-, context- and data-parallel layouts a plan is what the ranks hold and send.

On two ranks, for each: weights, gradients and optimizer state to the byte, activations as allocated, and the payloads
of the collectives of a step (log-probabilities, update, weight stream).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.common.launch import torchrun_json
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.unit.plan.ranks_worker import CASES, case_name

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"layers": 4},
    "untied": {"layers": 4, "tied": False, "vocab": 167, "kv_heads": 4},
    "one_kv_head": {"layers": 4, "tied": False, "kv_heads": 1},
}


def test_plans_hold_on_two_ranks(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        make_tiny_qwen3vl(tmp_path / name, **shape)
    nothing_wrong = {case_name(shape, overrides): [] for shape, overrides in CASES}
    assert torchrun_json(2, "tests.unit.plan.ranks_worker", str(tmp_path)) == [nothing_wrong] * 2
