# SPDX-License-Identifier: Apache-2.0
"""Claim: old log-probabilities that are the update's own change nothing in any layout.

Every metric and weight is that of the step that computes them beforehand, bit for bit; and the layouts agree.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.launch import torchrun_json
from tests.common.one_pass import CASES, recipe_of, take_step
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

# float32 sums in another order, over ranks.
TOLERANCE = 1e-5


def check(directory: Path, processes: int, layouts: list[str]) -> None:
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    alone = {
        case: take_step(layout_options(directory), recipe_of(*keys), row_tokens, beforehand=False).metrics
        for case, (keys, row_tokens) in CASES.items()
    }
    for rank in torchrun_json(processes, "tests.parallel.one_pass_worker", str(directory), *layouts, timeout=600):
        assert list(rank) == layouts
        for layout, cases in rank.items():
            for case, found in cases.items():
                assert found["differences"] == [], (layout, case)
                own, beforehand = found["passes"]
                assert own == beforehand - 1, (layout, case)
                assert found["metrics"] == pytest.approx(alone[case], rel=TOLERANCE, abs=TOLERANCE), (layout, case)


@pytest.mark.timeout(600)
def test_two_ranks_need_no_pass_of_their_own(tmp_path: Path) -> None:
    check(tmp_path, 2, ["2,1,1,plain", "1,2,1,plain", "1,1,2,plain", "1,1,1,distributed-overlap-gather"])


@pytest.mark.full
@pytest.mark.timeout(600)
def test_four_ranks_need_no_pass_of_their_own(tmp_path: Path) -> None:
    check(tmp_path, 4, ["2,1,2,plain", "1,2,2,distributed-overlap", "2,2,1,distributed"])
