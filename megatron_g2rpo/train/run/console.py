# SPDX-License-Identifier: Apache-2.0
"""The console of a run: on a terminal a live region below what scrolls, in a file one line a step.

Colours follow ``NO_COLOR``, ``FORCE_COLOR`` and whether this is a terminal, as rich does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_g2rpo import progress

HEADER_PERIOD = 20  # rows between two headers of the table
_ONE_LINE = {"no_wrap": True, "overflow": "ignore", "crop": False}
_WARNING = "warning: "
# Columns of the live table: heading, metric of a task, format.
_TASK_COLUMNS = (
    ("reward", "train/{}/reward", ".3f"),
    ("accuracy", "train/{}/accuracy", ".3f"),
    ("format", "train/{}/format", ".3f"),
    ("tokens", "train/{}/response_tokens", ".1f"),
    ("entropy", "train/{}/entropy", ".3f"),
    ("tied", "train/{}/zero_variance_groups", ".0%"),
    ("val", "val/{}/reward", ".3f"),
    ("greedy", "val/{}/greedy_reward", ".3f"),
)
_OF_A_TASK = re.compile(r"(?:train|val)/(.+)/reward")
# Lines that the region leaves to what scrolls.
_SCROLLING_LINES = 8


@dataclass(frozen=True)
class Column:
    """A column of the console table.

    Attributes:
        heading: what stands above it.
        metric: name of the metric that it shows.
        spec: format specification of the number.
    """

    heading: str
    metric: str
    spec: str = ".3f"


class RunConsole:
    """What a run shows while it is entered.

    Args:
        columns: columns of the table, of which each step is a line.
        max_num_steps: number of steps that the run takes.
        done: number of steps that were taken before.
        console: where to; None: standard output.
        quiet: whether to show warnings alone.
        enabled: whether this rank shows anything.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        max_num_steps: int,
        done: int,
        *,
        console: Console | None = None,
        quiet: bool = False,
        enabled: bool = True,
    ) -> None:
        self._console = console or Console()
        self._columns, self._rows = columns, 0
        self._last, self._first, self._done = max_num_steps, done, done
        self._quiet, self._enabled = quiet, enabled
        self._started = time.monotonic()
        self._values: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> RunConsole:
        self._started = time.monotonic()
        if self._enabled and not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._region, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a line, or a few; with ``quiet`` only what begins with ``warning:``."""
        if self._enabled and (not self._quiet or text.startswith(_WARNING)):
            style = "yellow" if text.startswith(_WARNING) else None
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        if not self._enabled:
            return
        self._done = step
        self._values.update(values)
        if not self._quiet and any(column.metric in values for column in self._columns):
            self._row(step, values)

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        if self._rows % HEADER_PERIOD == 0:
            self._console.print(
                "  ".join([f"{'step':>5}", *(f"{c.heading:>9}" for c in self._columns)]), style="bold", **_ONE_LINE
            )
        self._rows += 1
        cells = [f"{format(values[c.metric], c.spec):>9}" if c.metric in values else " " * 9 for c in self._columns]
        self._console.print("  ".join([f"{step:>5}", *cells]), highlight=False, **_ONE_LINE)

    def _region(self) -> RenderableType:
        """The live region, drawn anew twice a second by a thread of rich."""
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"step {self._done}/{self._last}", "bold"),
            ProgressBar(total=max(self._last, 1), completed=self._done, width=30),
            Text(f"{self.time_left()} left"),
            Text(progress.at().phase, "cyan"),
        )
        tasks = sorted({match[1] for name in list(self._values) if (match := _OF_A_TASK.fullmatch(name))})
        if not tasks:
            return bar
        return Group(self._tasks(tasks), bar)

    def _tasks(self, tasks: Sequence[str]) -> Table:
        columns = [column for column in _TASK_COLUMNS if any(column[1].format(task) in self._values for task in tasks)]
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("task")
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        room = max(1, self._console.height - _SCROLLING_LINES)
        for task in tasks[:room]:
            numbers = [self._values.get(metric.format(task)) for _, metric, _ in columns]
            cells = [
                "" if number is None else format(number, spec)
                for number, (_, _, spec) in zip(numbers, columns, strict=True)
            ]
            table.add_row(Text(task), *cells)
        if len(tasks) > room:
            table.add_row(Text(f"and {len(tasks) - room} more"))
        return table

    def time_left(self) -> str:
        """Return the time that the steps left will take, by those of this process, with all that lies between them."""
        taken = self._done - self._first
        if taken <= 0:
            return "-:--:--"
        seconds = (time.monotonic() - self._started) / taken * (self._last - self._done)
        return str(timedelta(seconds=round(seconds)))
