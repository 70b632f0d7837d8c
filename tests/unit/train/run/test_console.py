# SPDX-License-Identifier: Apache-2.0
"""Claims: a file gets plain lines, a terminal a live region; colours are off where they should be; quiet is quiet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from megatron_g2rpo import progress
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.g2rpo import COLUMNS, columns_of
from megatron_g2rpo.train.run import console as module
from megatron_g2rpo.train.run.console import Column, RunConsole
from tests.common.console_rows import row_of

LOSS = (Column("loss", "train/loss", ".4f"),)
COLOUR = re.compile(r"\x1b\[[\d;]*[349]\d[\d;]*m")


def shown(screen: RunConsole, file: io.StringIO) -> str:
    with screen:
        screen.note("a line [bold]as it is[/bold]")
        screen.note("warning: mind this")
        screen.step(1, {"train/loss": 0.5, "train/a/reward": 0.25, "val/b/greedy_reward": 0.75, "val/b/reward": 0.5})
    return file.getvalue()


def make(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, quiet: bool = False, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    console = Console(file=file, width=100, height=30, force_terminal=terminal)
    return shown(RunConsole(LOSS, 4, 0, console=console, quiet=quiet), file)


def test_a_file_gets_one_line_a_step_and_nothing_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(monkeypatch, terminal=False).splitlines() == [
        "a line [bold]as it is[/bold]",
        "warning: mind this",
        " step       loss",
        "    1     0.5000",
    ]


def test_the_line_of_a_step_is_found_in_a_log_and_under_a_label(make_recipe: Callable[..., TrainRecipe]) -> None:
    """As the tests of batch jobs look for it: of that step alone, with its number, and rank 0's."""
    file = io.StringIO()
    screen = RunConsole(columns_of(make_recipe()), 8, 0, console=Console(file=file, width=80))
    values = {"train/reward": -0.25, "train/loss": 0.5, "time/step": 8.0, "val/mean_reward": 8.5}
    with screen:
        screen.note("8 steps")
        for step in range(7, 9):
            screen.step(step, values)
    log = file.getvalue()
    for label in ("", "0: "):
        printed = "".join(label + line for line in log.splitlines(keepends=True))
        assert [bool(row_of(step, label).search(printed)) for step in (6, 7, 8, 80)] == [False, True, True, False]
        without = "".join(line for line in printed.splitlines(keepends=True) if not line.startswith(f"{label}    8"))
        assert not row_of(8, label).search(without), without
    assert not row_of(8, "0: ").search(log)
    assert not row_of(8, "0: ").search("".join("1: " + line for line in log.splitlines(keepends=True)))


def test_a_terminal_gets_the_phase_the_time_and_the_tasks_below_what_scrolls(monkeypatch: pytest.MonkeyPatch) -> None:
    progress.enter("update", step=2)
    text = make(monkeypatch, terminal=True)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert "step 1/4" in plain
    assert re.search(r"\d:\d\d:\d\d left", plain)
    assert "update" in plain
    assert re.search(r"task +reward +val +greedy", plain)
    assert re.search(r"^a +0\.250 *$", plain, re.MULTILINE)
    assert re.search(r"^b +0\.500 +0\.750 *$", plain, re.MULTILINE)
    assert COLOUR.search(text), "warnings and phases have a colour here, so that its absence elsewhere says something"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_off_on_a_terminal_that_wants_none(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    text = make(monkeypatch, terminal=True, **environment)
    assert "warning: mind this" in text
    assert not COLOUR.search(text)


def test_quiet_shows_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        text = make(monkeypatch, terminal=terminal, quiet=True)
        assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text) == "warning: mind this\n"


def test_the_time_left_is_that_of_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    screen = RunConsole(LOSS, 20, 10, console=Console(file=io.StringIO()))
    with screen:
        assert screen.time_left() == "-:--:--"
        now[0] += 30.0
        screen.step(12, {})
        assert screen.time_left() == "0:02:00", "two steps in 30 s, eight to go"


def test_more_tasks_than_lines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    screen = RunConsole(LOSS, 4, 0, console=Console(file=file, width=80, height=12))
    screen.step(1, {f"train/task{number}/reward": 0.5 for number in range(9)})
    console = Console(file=file, width=80, height=12)
    console.print(screen._region())
    assert "task3" in file.getvalue()
    assert "task4" not in file.getvalue()
    assert "and 5 more" in file.getvalue()


@pytest.mark.parametrize(("where", "metric"), [("loss", "train/reference_kl"), ("reward", "train/reference_kl_sum")])
def test_a_penalty_at_work_has_a_column(make_recipe: Callable[..., TrainRecipe], where: str, metric: str) -> None:
    key = "loss_fn.reference_policy_kl"
    assert columns_of(make_recipe(f"{key}.penalty=0")) == COLUMNS
    columns = columns_of(make_recipe(f"{key}.penalty=0.1", f"{key}.where={where}"))
    assert [column.metric for column in columns if column not in COLUMNS] == [metric]
