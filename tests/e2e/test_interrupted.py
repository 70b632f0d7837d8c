# SPDX-License-Identifier: Apache-2.0
"""Claims: a run that is killed or asked to stop, anywhere, and started again is the run that was not, bit for bit; one
that is asked saves, says so and ends with 75; asked twice, it ends at once.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.train.run import loop, signals, validation
from megatron_g2rpo.train.step import sampling
from tests.e2e.interrupted import Interrupt, ask, assert_same_run, interrupted_at, kill_all, kill_one, started
from tests.e2e.runs import LAYOUTS_OF_TWO, TENSOR_PARALLEL, assert_same_step, checkpoints
from tests.e2e.toy import Toy, call, metrics, succeed

STEPS = 12
LAYOUTS = {"1": (1, ()), "tp2": (2, (f"{TENSOR_PARALLEL}=2",)), "dp2": (2, ())}


def asks(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Send this process a signal when a function is first called, and wait until it is heard."""
    function: Callable[..., Any] = getattr(owner, name)

    def asking(*args: Any, **kwargs: Any) -> Any:
        patch.setattr(owner, name, function)
        os.kill(os.getpid(), signal.SIGUSR1)
        limit = time.monotonic() + 10.0
        while signals.current().number is None:
            assert time.monotonic() < limit, "the signal was not heard"
            time.sleep(0.001)
        return function(*args, **kwargs)

    patch.setattr(owner, name, asking)


def loses_its_servers(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """A run that waits for its servers is sent a signal, and its engine gives up; see ``asks``."""

    def lost(*args: Any, **kwargs: Any) -> None:
        raise EngineUnavailable("no rollout server is left", wait=True)

    patch.setattr(owner, name, lost)
    asks(patch, owner, name)


def test_a_run_that_is_asked_to_stop_anywhere_goes_on_bit_for_bit(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """The same run, asked again and again: in this function -> the checkpoint that is there when it has stopped."""
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    places = (
        ("while it waits for servers at the start", TransformersEngine, "load_weights", None),
        ("in the validation at the start, which is dropped", validation, "answers_both_ways", None),
        ("while the first step samples, which is dropped", sampling, "_round", None),
        ("while it saves", loop.Checkpoints, "save", 2),
        ("while a later step samples, which is dropped", sampling, "_round", 2),
        ("after a step that would not be saved", loop.Run, "validation", 3),
        ("in the last validation, which is dropped", validation, "answers_both_ways", 4),
        ("in the same validation, again", validation, "answers_both_ways", 4),
        ("while it waits for servers in the same validation", TransformersEngine, "load_weights", 4),
    )
    for where, owner, name, step in places:
        with pytest.MonkeyPatch.context() as patch:
            (loses_its_servers if owner is TransformersEngine else asks)(patch, owner, name)
            result = call("train", recipe)
        assert result.exit_code == 75, (where, result.output)
        assert checkpoints(run) == ([f"step_{step}"] if step else []), where
        said = f"after step {step}, saved in {run}/checkpoints/step_{step}" if step else "before the first step"
        assert result.output.count("stopped by SIGUSR1 ") == 1, (where, result.output)
        assert f"stopped by SIGUSR1 {said}" in result.output, (where, result.output)
    assert call("train", recipe).exit_code == 0
    assert_same_run(run, straight)


def test_a_run_that_is_killed_and_one_that_is_asked_go_on_bit_for_bit(toy: Toy, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml")
    chance = random.Random(0)
    for step, interrupt in ((1, kill_all), (3, ask)):
        with started(recipe, run, 1) as job:
            assert job.await_step(step), job.output()
            interrupt(job, chance)
    succeed("train", recipe, f"logger.log_dir={run}")
    assert_same_run(run, straight)


def test_a_deadline_of_the_recipe_stops_a_run_that_has_steps_left(toy: Toy, tmp_path: Path) -> None:
    """The process is older than a second before it has read its weights. It would be so each time: that is an error."""
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    result = call("train", recipe, "checkpointing.checkpoint_must_save_by='00:00:00:01'")
    assert result.exit_code == 1, result.output
    assert "stopped by checkpointing.checkpoint_must_save_by" in result.stderr
    assert "with no step taken since: set it to more" in result.stderr
    assert not (run / "metrics.jsonl").exists()  # the validation at the start was dropped, too


def test_without_checkpoints_a_run_that_is_asked_to_stop_is_no_run_that_goes_on(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    with pytest.MonkeyPatch.context() as patch:
        asks(patch, loop.Run, "validation")
        result = call("train", recipe, "checkpointing.enabled=false", "grpo.val_at_start=false")
    assert result.exit_code == 1, result.output
    assert "checkpointing.enabled is false: the steps since the start are lost" in result.stderr


@pytest.fixture(scope="module")
def uninterrupted(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A recipe of twelve steps, and the run that nothing interrupts, once for each layout."""
    root = tmp_path_factory.mktemp("uninterrupted")
    recipe = toy.recipe(root / "recipe.yaml", grpo={"max_num_steps": STEPS, "val_period": 5})

    def run_of(layout: str) -> tuple[Path, Path]:
        run, (nproc, keys) = root / layout, LAYOUTS[layout]
        if not run.exists():
            succeed("train", recipe, f"logger.log_dir={run}", *keys, nproc=nproc)
        return recipe, run

    return run_of


@pytest.mark.full
@pytest.mark.timeout(1500)  # eleven starts
@pytest.mark.parametrize("interrupt", [kill_one, kill_all, ask])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_interrupted_at_ten_random_points_is_the_uninterrupted_one_bit_for_bit(
    uninterrupted: Callable[[str], tuple[Path, Path]], tmp_path: Path, layout: str, interrupt: Interrupt
) -> None:
    if layout == "1" and interrupt is kill_one:
        pytest.skip("one rank is all ranks")
    recipe, expected = uninterrupted(layout)
    nproc, keys = LAYOUTS[layout]
    seed = list(LAYOUTS).index(layout) * 10 + (kill_one, kill_all, ask).index(interrupt)
    interrupted_at(recipe, tmp_path / "run", nproc, keys, interrupt, steps=STEPS, points=10, seed=seed)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_run_that_was_stopped_goes_on_at_another_layout(
    uninterrupted: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    recipe, expected = uninterrupted("1")
    run, chance = tmp_path / "run", random.Random(0)
    with started(recipe, run, 2) as job:
        assert job.await_step(1)
        ask(job, chance)
    step = max(metrics(run)) + 1
    succeed(
        "train",
        recipe,
        f"logger.log_dir={run}",
        *LAYOUTS_OF_TWO["tp2-sp"],
        f"grpo.max_num_steps={step}",
        nproc=2,
    )
    # See the tolerance of a second step in test_train.py.
    assert_same_step(metrics(run)[step], metrics(expected)[step], 1e-4)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_second_signal_ends_the_run_at_once_and_its_checkpoint_is_whole(
    uninterrupted: Callable[[str], tuple[Path, Path]], tmp_path: Path, nproc: int
) -> None:
    recipe, expected = uninterrupted("1" if nproc == 1 else "dp2")
    run = tmp_path / "run"
    with started(recipe, run, nproc) as job:
        assert job.await_step(3)
        job.send(signal.SIGUSR1, [job.process.pid])
        limit = time.monotonic() + 30.0  # two at once may be handled in either order
        while "asked to stop" not in job.output():
            assert time.monotonic() < limit, job.output()
            time.sleep(0.01)
        job.send(signal.SIGTERM, [job.process.pid])
        start = time.monotonic()
        assert job.end() == 128 + signal.SIGTERM, job.output()
        assert time.monotonic() - start < 10.0, "seconds; saving would take no longer, but a busy machine may"
    succeed("train", recipe, f"logger.log_dir={run}", nproc=nproc)
    assert_same_run(run, expected)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_supervised_run_that_is_asked_to_stop_goes_on_bit_for_bit(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", "sft", sft={"max_num_steps": 30})
    runs = tmp_path / "whole", tmp_path / "stopped"
    succeed("sft", recipe, f"logger.log_dir={runs[0]}")
    for step in (1, 2):
        with started(recipe, runs[1], 1, verb="sft") as job:
            if job.await_step(step - 1):
                ask(job, random.Random(step))
    succeed("sft", recipe, f"logger.log_dir={runs[1]}")
    assert_same_run(runs[1], runs[0])
