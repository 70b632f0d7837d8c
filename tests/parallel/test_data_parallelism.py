# SPDX-License-Identifier: Apache-2.0
"""Claims: the distributed optimizer and overlapped communication compute what the plain data parallelism does.

On rows with images, a micro-batch without any, a rank without rows, gradients in many padded buckets; a forward pass
right after a step sees the new weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.policy_layout import DATA_PARALLELISM
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.parallel.data_parallelism_worker import RECOMPUTE, TOLERANCES


def check(directory: Path, processes: int, tp: int, pp: int, cp: int) -> None:
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    worker = "tests.parallel.data_parallelism_worker"
    for results in torchrun_json(processes, worker, str(directory), str(tp), str(pp), str(cp), timeout=900):
        assert list(results) == [*DATA_PARALLELISM, RECOMPUTE]
        for worst in results.values():
            Report(TOLERANCES, worst).assert_within_tolerance()


@pytest.mark.timeout(900)
def test_every_mode_of_two_data_parallel_ranks(tmp_path: Path) -> None:
    check(tmp_path, 2, 1, 1, 1)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tp", "pp", "cp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["tp2-dp2", "pp2-dp2", "cp2-dp2"])
def test_every_mode_beside_model_parallelism(tmp_path: Path, tp: int, pp: int, cp: int) -> None:
    check(tmp_path, 4, tp, pp, cp)
