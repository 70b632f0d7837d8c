# SPDX-License-Identifier: Apache-2.0
"""Claims: a policy resumes bit for bit in its own layout, and goes on as it would have in another one.

Layouts differ in tensor, pipeline, context and data parallelism, and in whether the optimizer's state is shared out
over data-parallel ranks: its checkpoints load with the other optimizer, too.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.parallel.checkpoint_layouts_worker import UPDATE_TOLERANCE, Case

# tp,pp,cp,mode,precision on two ranks; what is left is data parallel.
TENSOR = "2,1,1,plain,float32"
TENSOR_SHARED = "2,1,1,distributed,float32"
DATA = "1,1,1,plain,float32"
DATA_SHARED = "1,1,1,distributed-overlap-gather,float32"
PIPELINE = "1,2,1,plain,float32"
PIPELINE_SHARED = "1,2,1,distributed-overlap-gather,float32"
CONTEXT = "1,1,2,overlap,float32"
CONTEXT_SHARED = "1,1,2,distributed-overlap,float32"
ALL = (TENSOR, TENSOR_SHARED, DATA, DATA_SHARED, PIPELINE, PIPELINE_SHARED, CONTEXT, CONTEXT_SHARED)


def check(directory: Path, processes: int, pairs: list[tuple[str, str]]) -> None:
    """Each pair: a layout, and the layout whose checkpoint it loads."""
    # Pipeline parallelism ties the embedding over stages, tensor parallelism pads the odd vocabulary.
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    sources = list(dict.fromkeys(source for _, source in pairs))
    loads = [f"{target}<{source}" for target, source in pairs]
    targets = [Case.parse(target) for target, _ in pairs]
    worker = "tests.parallel.checkpoint_layouts_worker"
    for errors in torchrun_json(processes, worker, str(directory), *sources, *loads, timeout=1200):
        assert list(errors) == loads
        report = Report({case.precision: UPDATE_TOLERANCE[case.precision] for case in targets})
        for case, load in zip(targets, loads, strict=True):
            report.note(case.precision, errors[load], load)
        report.assert_within_tolerance()


@pytest.mark.timeout(1200)
def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    same = [(case, case) for case in (TENSOR, DATA_SHARED, PIPELINE_SHARED, CONTEXT_SHARED)]
    # A ring over the layouts, in which both optimizers load from both.
    ring = [
        (DATA_SHARED, TENSOR),
        (PIPELINE_SHARED, DATA_SHARED),
        (CONTEXT, PIPELINE_SHARED),
        (TENSOR, CONTEXT_SHARED),
        (DATA, TENSOR),
    ]
    check(tmp_path, 2, [*same, *ring])


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", ALL)
def test_checkpoints_move_to_all_layouts(tmp_path: Path, source: str) -> None:
    check(tmp_path, 2, [(target, source) for target in ALL])


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_checkpoints_of_bf16_keep_the_float32_copies(tmp_path: Path) -> None:
    cases = [case.replace("float32", "bfloat16") for case in (TENSOR, DATA_SHARED, PIPELINE_SHARED, CONTEXT)]
    check(tmp_path, 2, [*zip(cases, cases, strict=True), *itertools.pairwise([*cases, cases[0]])])


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_checkpoints_move_between_layouts_of_four_ranks(tmp_path: Path) -> None:
    mixed = [
        "2,1,1,distributed-overlap-gather,float32",
        "1,2,1,distributed-overlap-gather,float32",
        "1,1,2,distributed-overlap-gather,float32",
        "2,2,1,distributed,float32",
        "1,1,1,plain,float32",
    ]
    check(tmp_path, 4, [*zip(mixed, mixed, strict=True), *itertools.pairwise([*mixed, mixed[0]])])
