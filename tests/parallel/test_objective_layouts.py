# SPDX-License-Identifier: Apache-2.0
"""Claim: surrogate, KL term, importance weights and entropy shaping have the same gradient in every layout.

Against transformers' autograd through the plain formula (``tests.common.objective_parity``): the hinge of a global
mean, and GSPO's ratio of a sequence that context-parallel ranks share, are the parts that a layout could change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.objective_parity import OBJECTIVES, load_model, objective, oracle
from tests.common.parity import parity_sequences
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.parallel.objective_worker import TOLERANCES


def check(directory: Path, processes: int, layouts: list[str]) -> None:
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    model, sequences = load_model(directory), parity_sequences(AutoConfig.from_pretrained(directory))
    torch.save({name: oracle(model, sequences, objective(name)) for name in OBJECTIVES}, directory / "oracle.pt")
    for results in torchrun_json(processes, "tests.parallel.objective_worker", str(directory), *layouts, timeout=600):
        assert list(results) == layouts
        for worst in results.values():
            Report(TOLERANCES, worst).assert_within_tolerance()


@pytest.mark.timeout(600)
def test_the_objective_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    check(tmp_path, 2, ["2,1,1,plain", "1,2,1,plain", "1,1,2,plain", "1,1,1,plain", "1,1,1,distributed-overlap-gather"])


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_objective_is_the_same_on_four_ranks(tmp_path: Path) -> None:
    check(tmp_path, 4, ["1,1,4,plain", "2,1,2,plain", "1,2,2,distributed-overlap", "1,1,2,distributed"])
