# SPDX-License-Identifier: Apache-2.0
"""Claims: on Transformer Engine's layers a run resumes bit for bit, and its checkpoints and weights are local layers'.

Norms that Transformer Engine folds into its linears, its Adam, and FP8 (scales, and weights that are FP8) change no bit
of what a checkpoint holds or the weight stream yields; the worker asserts that. A tolerance is stated where arithmetic
differs. The parts of one process share a launch where they see the same libraries: an import takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.gpu.devices import VIRTUAL, needs_cuda, needs_transformer_engine

pytestmark = [needs_cuda, needs_transformer_engine]

WORKER = "tests.gpu.checkpoints_worker"

TOLERANCES = {
    # Both compute in float32, in another order: a weight near 1 rounds an update of 1e-3 to 6e-5 of it.
    "optimizer step": 1e-4,
    # Layers differ in bf16's rounding, and Adam makes a step of the learning rate out of any gradient near zero (see
    # UPDATE_TOLERANCE of tests/parallel/checkpoint_layouts_worker.py).
    "two steps": 0.1,
}


def run(directory: Path, processes: int, *parts: str, **environment: str) -> dict[str, float]:
    """The figures of rank 0, all parts' together."""
    results = torchrun_json(processes, WORKER, str(directory), *parts, timeout=900, **environment)
    return {name: value for figures in results[0].values() for name, value in figures.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    # Tensor parallelism pads the odd vocabulary, and pipeline stages share the tied embedding.
    make_tiny_qwen3vl(path, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    return path


@pytest.mark.timeout(900)
def test_checkpoints_of_one_process(directory: Path) -> None:
    run(directory, 1, "engine", "delayed")


@pytest.mark.timeout(900)
def test_fp8_weights_are_saved_and_streamed_as_what_they_were_rounded_from(directory: Path) -> None:
    run(directory, 1, "fp8_weights")


@pytest.mark.timeout(900)
@pytest.mark.skipif(not VIRTUAL, reason="hides Transformer Engine from some processes, as the virtual device can")
def test_either_adam_goes_on_from_the_other(tmp_path: Path) -> None:
    make_tiny_qwen3vl(tmp_path, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    run(tmp_path, 1, "torch_saves", VIRTUAL_TE="0")
    report = Report(TOLERANCES)
    for name, error in run(tmp_path, 1, "engine_loads", "engine").items():
        report.note(name, error)
    report.assert_within_tolerance()
    run(tmp_path, 1, "torch_loads", VIRTUAL_TE="0")


@pytest.mark.timeout(900)
def test_checkpoints_and_streams_of_two_ranks(directory: Path) -> None:
    run(directory, 2, "layouts")


@pytest.mark.timeout(900)
def test_fp8_weights_whose_copies_are_shared_out(directory: Path) -> None:
    run(directory, 2, "fp8_weights_of_two")
