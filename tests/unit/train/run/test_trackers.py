# SPDX-License-Identifier: Apache-2.0
"""Claims: a tracker gets what is logged; one that fails, hangs or is missing ends, slows and hides nothing.

The library is a stand-in of these tests; ``tests/trackers`` has the real ones.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_g2rpo.processes.kept import Kept
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.run.trackers import feed, worker
from megatron_g2rpo.train.run.trackers.backends import Identity
from megatron_g2rpo.train.run.trackers.feed import TrackerError, Trackers, require

MakeRecipe = Callable[..., TrainRecipe]
WANDB = "logger.wandb_enabled=true"
LONG = 200.0  # seconds that a busy machine may take to start a process
# Stand-ins for the worker: what each does with its standard input.
KEEPS = "import sys; open({path!r}, 'w').write(sys.stdin.read())"
HANGS = "import time; time.sleep(1000)"
FAILS = "import sys; sys.stdin.readline(); print('no such project'); sys.exit(3)"


class Library:
    """Stands for a tracker's library.

    Args:
        fails_at: steps whose numbers it refuses.
    """

    def __init__(self, fails_at: Sequence[int] = ()) -> None:
        self.identity: Identity | None = None
        self.steps: list[int] = []
        self.tables: list[int] = []
        self.failed: bool | None = None
        self._fails_at = fails_at

    def make(self, identity: Identity) -> Library:
        self.identity = identity
        return self

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step in self._fails_at:
            raise ConnectionError("no server")
        self.steps.append(step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append(step)

    def finish(self, *, failed: bool) -> None:
        self.failed = failed


RUN = {
    "project": "p",
    "name": None,
    "entity": None,
    "id": "abc",
    "directory": "runs/a",
    "config": {"grpo": {"seed": 1}},
}


def lines_of(steps: Sequence[int], *, end: bool = True) -> list[str]:
    told = [{"step": step, "metrics": {"train/loss": 0.5}} for step in steps]
    return [
        json.dumps(each)
        for each in (RUN, {"step": steps[0], "samples": [{}]}, *told, *([{"end": False}] if end else []))
    ]


def test_the_worker_tells_its_library_everything_in_order(tmp_path: Path) -> None:
    library = Library()
    assert worker.work(lines_of([0, 1, 2]), library.make, tmp_path / "record") == 0
    assert library.identity == Identity(**RUN)  # type: ignore[arg-type]
    assert library.identity.shown_as == "a"
    assert (library.tables, library.steps, library.failed) == ([0], [0, 1, 2], False)


def test_a_run_that_goes_on_logs_no_step_twice(tmp_path: Path) -> None:
    worker.work(lines_of([0, 1, 2], end=False), Library().make, tmp_path / "record")
    library = Library()
    worker.work(lines_of([1, 2, 3]), library.make, tmp_path / "record")
    assert (library.tables, library.steps) == ([], [3])


def test_input_that_ends_early_is_a_run_that_failed(tmp_path: Path) -> None:
    library = Library()
    assert worker.work(lines_of([0], end=False), library.make, tmp_path / "record") == 0
    assert library.failed is True


def test_a_library_that_fails_now_and_then_is_told_the_rest_and_the_exit_code_says_it(tmp_path: Path) -> None:
    library = Library(fails_at=[1])
    assert worker.work(lines_of([0, 1, 2]), library.make, tmp_path / "record") == worker.SOME_FAILED
    assert library.steps == [0, 2]


def test_a_library_that_always_fails_is_given_up_and_one_that_does_not_start_too(tmp_path: Path) -> None:
    steps = range(worker.MOST_FAILURES + 5)
    library = Library(fails_at=steps)
    assert worker.work(lines_of(steps), library.make, tmp_path / "record") == worker.GAVE_UP

    def refuse(identity: Identity) -> Library:
        raise RuntimeError("api_key not configured")

    assert worker.work(lines_of(steps), refuse, tmp_path / "record") == worker.NOT_STARTED


@pytest.mark.parametrize("damaged", [b"", b"1", b"x\n", b"\xff\xfe"], ids=["empty", "cut", "text", "bytes"])
def test_a_damaged_record_costs_at_most_doubled_steps_and_is_said(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut one may read as a number: 1 of 12. None of it may cost the tracker, or a step that it does not have."""
    record = tmp_path / "record"
    record.write_bytes(damaged)
    library = Library()
    assert worker.work(lines_of((1, 2)), library.make, record) == 0
    assert library.steps == [1, 2]
    assert f"{record} is damaged" in capsys.readouterr().err
    assert worker.work(lines_of((2, 3)), (again := Library()).make, record) == 0
    assert again.steps == [3]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs a program of the test in the place of every tracker's worker."""

    def use(source: str) -> None:
        monkeypatch.setattr(
            feed, "Kept", lambda program, output, grace_s: Kept([sys.executable, "-c", source], output, grace_s=grace_s)
        )

    return use


def log(recipe: TrainRecipe, steps: int, *, until_ended: bool = False, more: int = 1) -> str:
    """Log some steps, all but the first after the trackers have ended if asked for; what the console shows."""
    file = io.StringIO()
    trackers = Trackers(recipe.logger, recipe.model_dump(mode="json"), "0123456789abcdef")
    columns = (Column("loss", "train/loss", ".4f"),)
    console = Console(file=file, width=400)
    with MetricsLog(recipe.logger, columns, steps, -1, enabled=True, trackers=trackers, console=console) as metrics:
        for step in range(steps):
            values = {f"other/{number}": 0.1 for number in range(more)}
            metrics.log(StepMetrics(step=step, values={"train/loss": step / 7, **values}))
            for each in trackers._feeds if until_ended else ():
                assert each._process is not None
                assert each._process.wait(LONG) is not None
    return file.getvalue()


def logged(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def test_the_process_is_told_the_run_its_recipe_and_every_step_to_the_last_bit(
    make_recipe: MakeRecipe, stand_in: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "FINISH_S", LONG)
    told = tmp_path / "told"
    stand_in(KEEPS.format(path=str(told)))
    said = log(make_recipe(WANDB, "logger.wandb.project=p", "logger.wandb.name=mine"), 3)
    assert "warning" not in said
    first, *rest = map(json.loads, told.read_text().splitlines())
    assert (first["project"], first["name"], first["id"]) == ("p", "mine", "0123456789abcdef")
    assert first["config"]["logger"]["wandb"]["project"] == "p"
    assert rest[:-1] == [{"step": step, "metrics": {"train/loss": step / 7, "other/0": 0.1}} for step in range(3)]
    assert rest[-1] == {"end": False}


def test_a_run_that_logs_no_more_waits_for_something_else_while_its_trackers_end(
    make_recipe: MakeRecipe, stand_in: Callable[[str], None], tmp_path: Path
) -> None:
    """They are told the end once, and one that has ended by then is no news."""
    told = tmp_path / "told"
    stand_in(KEEPS.format(path=str(told)))
    recipe, file = make_recipe(WANDB), io.StringIO()
    trackers = Trackers(recipe.logger, {}, "0123456789abcdef")
    console = Console(file=file, width=400)
    with MetricsLog(recipe.logger, (), 1, -1, enabled=True, trackers=trackers, console=console) as metrics:
        metrics.log(StepMetrics(step=0, values={"train/loss": 0.5}))
        metrics.complete()
        (process,) = (each._process for each in trackers._feeds)
        assert process is not None
        assert process.wait(LONG) == 0
    assert told.read_text().count('"end"') == 1
    assert "warning" not in file.getvalue()


def test_one_that_fails_is_said_once_with_why_and_the_run_goes_on(
    run: Path, make_recipe: MakeRecipe, stand_in: Callable[[str], None]
) -> None:
    stand_in(FAILS)
    said = log(make_recipe(WANDB, "logger.trackio_enabled=true"), 5, until_ended=True)
    assert logged(run) == 5
    for name in ("wandb", "trackio"):
        assert (
            said.count(f"warning: {name} has ended, and the run goes on without it: exit code 3; 'no such project'")
            == 1
        )


def test_one_that_hangs_is_said_and_ended_and_no_step_waits_for_it(
    run: Path, make_recipe: MakeRecipe, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipe (64 KiB) and the queue are full long before the last step, which a put that waits would never reach."""
    stand_in(HANGS)
    monkeypatch.setattr(feed, "QUEUE_LINES", 8)
    monkeypatch.setattr(feed, "FINISH_S", 0.5)
    said = log(make_recipe(WANDB, "logger.tensorboard_enabled=false"), 60, more=500)  # 8 kB a line
    assert logged(run) == 60
    assert said.count("warning: wandb does not keep up") == 1
    assert said.count("warning: wandb did not finish in time and was ended") == 1


def test_one_that_cannot_be_started_is_said(run: Path, make_recipe: MakeRecipe) -> None:
    run.mkdir()
    (run / "trackers").write_text("a file where the folder would be")
    said = log(make_recipe(WANDB), 3)
    assert logged(run) == 3
    assert said.count("warning: wandb has ended, and the run goes on without it: ") == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_one_that_is_not_installed_is_an_error_that_says_what_to_install(
    name: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    require(make_recipe().logger)
    with pytest.raises(TrackerError) as caught:
        require(make_recipe(f"logger.{name}_enabled=true").logger)
    assert f"pip install 'megatron-g2rpo[{name}]', or set logger.{name}_enabled=false" in str(caught.value)


def test_other_ranks_start_none(make_recipe: MakeRecipe, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "Kept", None)
    recipe = make_recipe(WANDB)
    with MetricsLog(recipe.logger, (), 1, -1, enabled=False, trackers=Trackers(recipe.logger, {}, "")) as metrics:
        metrics.log(StepMetrics(step=1, values={"train/loss": 1.0}))
    assert not run.exists()
