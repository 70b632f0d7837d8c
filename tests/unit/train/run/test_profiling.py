# SPDX-License-Identifier: Apache-2.0
"""Claims: traces are written of the steps and ranks that are named, with named phases; a full disk ends nothing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_g2rpo.policy.device import Device, dump_memory_snapshot, init_process_group, select
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.profiling import StepProfiler
from megatron_g2rpo.train.step.metrics import memory_metrics
from megatron_g2rpo.train.step.timers import Timers

MakeRecipe = Callable[..., TrainRecipe]
ON = "logger.profile.enabled=true"


@pytest.fixture
def device() -> Device:
    device = select("cpu")
    init_process_group(device)
    return device


def take(recipe: TrainRecipe, device: Device, steps: range) -> list[str]:
    """Take steps of two phases; what the user is told."""
    notes: list[str] = []
    profiler = StepProfiler(recipe.logger, device, notes.append)
    for step in steps:
        with profiler.step(step):
            timers = Timers(device)
            with timers("generation"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            with timers("update"):
                torch.ones(8).sum()
    return notes


def test_the_named_steps_leave_a_trace_with_their_phases(run: Path, make_recipe: MakeRecipe, device: Device) -> None:
    notes = take(make_recipe(ON, "logger.profile.steps=[2,4]"), device, range(1, 6))
    names = ["step_2-rank_0.json.gz", "step_4-rank_0.json.gz"]
    assert sorted(path.name for path in (run / "profile").iterdir()) == names
    assert [note.rpartition("/")[2] for note in notes] == names
    with gzip.open(run / "profile" / names[0], "rt") as file:
        events = {event.get("name"): event for event in json.load(file)["traceEvents"]}
    assert {"step 2", "generation", "update", "aten::mm"} <= events.keys()
    phase, product = events["generation"], events["aten::mm"]
    assert phase["ts"] <= product["ts"] < phase["ts"] + phase["dur"]


@pytest.mark.parametrize("keys", [(), (ON, "logger.profile.ranks=[1]"), (ON, "logger.profile.steps=[9]")])
def test_nothing_is_recorded_otherwise(
    run: Path, make_recipe: MakeRecipe, device: Device, keys: tuple[str, ...]
) -> None:
    assert take(make_recipe(*keys), device, range(1, 3)) == []
    assert not run.exists()


def test_a_trace_that_cannot_be_written_is_said(run: Path, make_recipe: MakeRecipe, device: Device) -> None:
    run.mkdir()
    (run / "profile").write_text("a file where the folder would be")
    [note] = take(make_recipe(ON, "logger.profile.steps=[1]"), device, range(1, 3))
    assert note.startswith("warning: no trace of step 1: ")


def test_a_step_that_fails_leaves_no_trace_and_its_error(run: Path, make_recipe: MakeRecipe, device: Device) -> None:
    profiler = StepProfiler(make_recipe(ON, "logger.profile.steps=[1]").logger, device, print)
    with pytest.raises(FloatingPointError, match="as it was"), profiler.step(1):
        raise FloatingPointError("as it was")
    assert not run.exists()


def test_the_peak_of_the_memory_is_a_number_of_this_process(device: Device) -> None:
    before = memory_metrics(device)["memory/peak_gb"]
    held = torch.ones(int(before * 1e9) // 4 + 64 * 2**20 // 4)  # more than all before by 64 MiB at least
    assert memory_metrics(device)["memory/peak_gb"] > before
    assert 0.01 < before < 1000.0
    del held


def test_there_is_no_snapshot_of_a_memory_that_no_gpu_has(tmp_path: Path) -> None:
    assert not torch.cuda.is_initialized()
    assert not dump_memory_snapshot(tmp_path / "snapshot.pickle")
    assert list(tmp_path.iterdir()) == []
