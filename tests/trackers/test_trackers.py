# SPDX-License-Identifier: Apache-2.0
"""Claims: real trackers get every step once, however often a run is broken off; they end with the run, however it ends.

Weights & Biases and trackio themselves, offline; what their files hold is read in `reading`.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.examples import Example
from megatron_g2rpo.train.run.logs import MetricsLog, StepMetrics
from megatron_g2rpo.train.run.trackers import feed
from megatron_g2rpo.train.run.trackers.feed import Trackers
from tests.common.recipes import G2RPO
from tests.trackers.reading import trackio_history, trackio_runs, wandb_history, wandb_runs, wandb_tables

RUN_ID = "0123456789abcdef0123456789abcdef"
LONG = 120.0
# A response that a table must hold as it is, up to what no encoding takes.
HARD = '<script>alert(1)</script> \u202e right to left \ud800 "quoted"\n' + "long " * 2000


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else uses the machine, the libraries take their time to start."""
    monkeypatch.setattr(feed, "FINISH_S", LONG)


def recipe_of(run: Path, project: str, *trackers: str) -> TrainRecipe:
    keys = [f"logger.{name}_enabled=true" for name in trackers]
    projects = [f"logger.{name}.project={project}" for name in ("wandb", "trackio")]
    keys += ["logger.tensorboard_enabled=false", "grpo.seed=1234", *projects]
    return recipes.load(G2RPO, [f"logger.log_dir={run}", *keys], "train")


def example(step: int) -> Example:
    return Example(
        task="sum", key=f"sum-{step}", kind="greedy", reward=None, question="?", response=HARD, reference="4"
    )


def log(recipe: TrainRecipe, steps: range) -> str:
    """Log steps as an attempt of a run, with a table at each even one; what the console shows."""
    file = io.StringIO()
    trackers = Trackers(recipe.logger, recipe.model_dump(mode="json"), RUN_ID)
    console = Console(file=file, width=300)
    with MetricsLog(recipe.logger, (), 9, steps.start - 1, enabled=True, trackers=trackers, console=console) as metrics:
        for step in steps:
            if step % 2 == 0:
                metrics.examples(step, [example(step)], [])
            metrics.log(StepMetrics(step=step, values={"train/loss": step / 7, "train/sum/reward": 0.5}))
    return file.getvalue()


def test_wandb_has_run_recipe_numbers_and_tables_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "p", "wandb")
    assert log(recipe, range(4)) == ""
    assert log(recipe, range(3, 6)) == "", "it goes on from a checkpoint of step 2, and step 3 was logged"
    history = wandb_history(tmp_path)
    assert {step: values["train/loss"] for step, values in history.items()} == {step: step / 7 for step in range(6)}
    assert [step for step, values in history.items() if any("samples" in name for name in values)] == [0, 2, 4]
    first, second = wandb_runs(tmp_path)
    assert first.run_id == second.run_id == RUN_ID
    assert (first.project, first.display_name) == ("p", tmp_path.name)
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["grpo"]["seed"] == 1234
    tables = wandb_tables(tmp_path)
    assert len(tables) == 3
    assert tables[0]["columns"] == ["task", "key", "kind", "reward", "question", "response", "reference"]
    assert sorted(table["data"][0][1] for table in tables) == ["sum-0", "sum-2", "sum-4"]
    assert tables[0]["data"][0][5].startswith('<script>alert(1)</script> \u202e right to left ? "quoted"\nlong long')


def test_trackio_has_run_recipe_numbers_and_tables_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "goes-on", "trackio")
    assert log(recipe, range(4)) == ""
    assert log(recipe, range(3, 6)) == ""
    [run] = trackio_runs("goes-on")
    assert run.name == f"{tmp_path.name}-{RUN_ID[:8]}"
    assert run.config["grpo"]["seed"] == 1234
    history = trackio_history("goes-on", run)
    assert {step: values["train/loss"] for step, values in history.items()} == {step: step / 7 for step in range(6)}
    assert [step for step, values in history.items() if "val/samples" in values] == [0, 2, 4]
    [row] = history[4]["val/samples"]["_value"]
    assert (row["task"], row["key"], row["kind"], row["reward"]) == ("sum", "sum-4", "greedy", None)


OWNER = """
import sys, time
from pathlib import Path
from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.train.run.trackers.feed import Trackers
recipe = recipes.load(Path(sys.argv[1]), sys.argv[2:], "train")
trackers = Trackers(recipe.logger, recipe.model_dump(mode="json"), "0123456789abcdef0123456789abcdef")
trackers.start()
trackers.metrics(1, {"train/loss": 0.25})
print("started", flush=True)
time.sleep(1000)
"""


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_run_that_was_killed_and_what_it_logged_is_there(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Of each: the keeper, the worker, and what the library starts, such as wandb's service."""
    project = f"killed-{number}"
    keys = ["logger.wandb_enabled=true", "logger.trackio_enabled=true", f"logger.trackio.project={project}"]
    command = [sys.executable, "-c", OWNER, str(G2RPO), f"logger.log_dir={tmp_path}", *keys]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "started\n"
            both = [tmp_path / "trackers" / f"{name}-01234567.step" for name in ("wandb", "trackio")]
            until(lambda: all(path.exists() for path in both), "a tracker has not logged")
            processes = psutil.Process(owner.pid).children(recursive=True)
            names = [" ".join(process.cmdline()) for process in processes]
            assert len([name for name in names if "processes.kept" in name]) == 2
            assert any("wandb-core" in name or "wandb_core" in name for name in names), names
        finally:
            owner.send_signal(number)
    until(lambda: not alive(processes), f"left: {alive(processes)}")
    assert wandb_history(tmp_path)[1]["train/loss"] == 0.25
    [run] = trackio_runs(project)
    assert trackio_history(project, run)[1]["train/loss"] == 0.25


def test_a_server_that_nobody_reaches_ends_nothing_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(feed, "FINISH_S", 3.0)
    said = log(recipe_of(tmp_path, "p", "wandb"), range(4))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert said.count("warning: wandb ") == 1, said


def test_a_missing_key_is_said_with_what_the_library_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # where a developer's own key may be
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = log(recipe_of(tmp_path / "run", "p", "wandb"), range(4))
    assert said.count("warning: wandb ") == 1, said
    assert "key" in said.lower(), said


def test_the_versions_are_those_of_the_environment() -> None:
    from importlib.metadata import version

    from megatron_g2rpo.commands.doctor.lock import read_lock

    root = Path(__file__).parents[2]
    pins = read_lock(root / "constraints" / "trackers.txt")
    for name in ("wandb", "trackio"):
        assert version(name) == pins[name]
        assert f"{name}=={pins[name]} " in (root / "Makefile").read_text()
