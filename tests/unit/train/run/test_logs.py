# SPDX-License-Identifier: Apache-2.0
"""Claims: metrics.jsonl and TensorBoard hold every step once, however often the run was broken off; rank 0 writes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run import event_files
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.run.metrics_file import MetricsFileError

MakeRecipe = Callable[..., TrainRecipe]
COLUMNS = (Column("loss", "train/loss", ".4f"), Column("val", "val/mean_reward"))


def log(recipe: TrainRecipe, steps: range, *, enabled: bool = True) -> str:
    """Log the given steps as a run that continues before the first of them; what the console shows."""
    file = io.StringIO()
    console = Console(file=file, width=40)
    with MetricsLog(recipe.logger, COLUMNS, 9, steps.start - 1, enabled=enabled, console=console) as metrics:
        for step in steps:
            metrics.log(StepMetrics(step=step, values={"train/loss": step / 7}))
    return file.getvalue()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(run: Path, make_recipe: MakeRecipe) -> TrainRecipe:
    run.mkdir()
    return make_recipe("logger.tensorboard_enabled=false")


def test_a_line_holds_the_step_and_every_value_to_the_last_bit(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(1, 3))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1 / 7}, {"step": 2, "train/loss": 2 / 7}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(6))
    assert steps(run) == [0, 1, 2, 3, 4, 5]
    log(recipe, range(4, 8))
    assert steps(run) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_a_checkpoint_starts_its_metrics_anew(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(3))
    log(recipe, range(2))
    assert steps(run) == [0, 1]


def test_a_line_that_a_killed_run_did_not_finish_is_dropped(run: Path, recipe: TrainRecipe) -> None:
    log(recipe, range(3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    log(recipe, range(3, 5))
    assert steps(run) == [0, 1, 2, 3, 4]


def test_other_ranks_write_and_print_nothing(run: Path, recipe: TrainRecipe) -> None:
    assert log(recipe, range(3), enabled=False) == ""
    assert list(run.iterdir()) == []


def test_the_table_shows_a_blank_for_a_metric_that_a_step_lacks(recipe: TrainRecipe) -> None:
    header, row = log(recipe, range(1, 2)).splitlines()
    assert header.split() == ["step", "loss", "val"]
    assert row.split() == ["1", "0.1429"]


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar, in the order in which TensorBoard shows them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def at(clock: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock by which event files are named."""
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", SimpleNamespace(time=lambda: clock))


@pytest.mark.parametrize("clocks", [(1e9, 2e9, 3e9, 4e9), (4e9, 3e9, 2e9, 1e9), (2e9, 4e9, 1e9, 3e9), (1e9,) * 4])
def test_tensorboard_shows_a_run_that_was_broken_off_often_as_one_that_was_not(
    run: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, clocks: Sequence[float]
) -> None:
    """Whatever the clocks of its nodes say. Names, steps and values are compared, all of them exactly."""
    recipe = make_recipe()
    log(recipe, range(9))
    expected = tensorboard(run)
    assert [step for step, _ in expected["train/loss"]] == list(range(9))
    (run / "tensorboard").rename(run.with_name("uninterrupted"))
    # The first attempt left no checkpoint: the second begins at step 0 again.
    for clock, these in zip(clocks, (range(4), range(6), range(4, 8), range(6, 9)), strict=True):
        at(clock, monkeypatch)
        log(recipe, these)
        newest = max((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with newest.open("ab") as file:
            file.write(b"\x18\x00\x00")  # it was killed while it wrote
    assert tensorboard(run) == expected
    assert sorted(raw_steps(run)) == list(range(9)), "for readers that do not drop what a later file supersedes"


def test_a_start_that_was_killed_while_it_cut_event_files_loses_and_doubles_nothing(
    run: Path, make_recipe: MakeRecipe
) -> None:
    log(make_recipe(), range(6))
    expected = tensorboard(run)
    (path,) = (run / "tensorboard").iterdir()
    before = path.read_bytes()
    event_files.keep_steps(run / "tensorboard", 5)
    path.write_bytes(before)  # it was not removed yet
    (run / "tensorboard" / f"{event_files.EARLIER}.partial").write_bytes(before[:50])
    event_files.keep_steps(run / "tensorboard", 5)
    assert tensorboard(run) == expected
    assert sorted(raw_steps(run)) == list(range(6))


def raw_steps(run: Path) -> Iterator[int]:
    for path in (run / "tensorboard").iterdir():
        yield from (event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary"))


def test_a_running_tensorboard_drops_what_a_resumed_run_repeats(
    run: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(make_recipe(), range(5))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for number, first in enumerate((3, 0)):
        at(2e9 + number, monkeypatch)
        log(make_recipe(), range(first, 4))
        assert [event.step for event in events.Reload().Scalars("train/loss")] == [0, 1, 2, 3]


def test_what_a_step_logged_is_on_the_disk_before_its_checkpoint_can_be(run: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    console = Console(file=io.StringIO())
    with MetricsLog(recipe.logger, COLUMNS, 9, -1, enabled=True, console=console) as metrics:
        metrics.log(StepMetrics(step=1, values={"train/loss": 0.5}))
        assert steps(run) == [1]
        assert tensorboard(run) == {"train/loss": [(1, 0.5)]}


@pytest.mark.parametrize(
    "line", [b"\n", bytes(8) + b"\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"[1]\n", b'{"step": 1, "tr\n', b"\xff\n"]
)
def test_a_line_that_no_run_wrote_is_named_and_nothing_is_removed(run: Path, recipe: TrainRecipe, line: bytes) -> None:
    log(recipe, range(2))
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b'{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(MetricsFileError, match=rf"^{path}, line 3: "):
        log(recipe, range(2, 4))
    assert path.read_bytes() == before


FULL = """
import resource, signal, sys
from pathlib import Path
from megatron_g2rpo.train.run import metrics_file
from megatron_g2rpo.train.run.files import replace_bytes

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8,) * 2)
for write in (lambda: metrics_file.append(path, 3, {"train/loss": 0.25}), lambda: replace_bytes(path, bytes(10_000))):
    try:
        write()
    except OSError as error:
        print(error)
"""


def test_a_disk_that_is_full_is_named_with_the_file_and_leaves_it_usable(run: Path, recipe: TrainRecipe) -> None:
    """It ends in the middle of a line. Of a process that may write no larger files: no root is needed for that."""
    log(recipe, range(3))
    path = run / "metrics.jsonl"
    said = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True).stdout
    assert said == f"[Errno 27] File too large: '{path}'\n" * 2
    assert path.read_text().endswith('\n{"step":'), "a part of the line was written"
    assert [each.name for each in run.iterdir()] == ["metrics.jsonl"]
    log(recipe, range(3, 5))
    assert steps(run) == [0, 1, 2, 3, 4]
