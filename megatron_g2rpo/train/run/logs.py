# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl, TensorBoard, and the console's progress bar and table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.recipe.run_sections import Logger
from megatron_g2rpo.types import Rollout

METRICS_FILE = "metrics.jsonl"
HEADER_PERIOD = 20  # rows between two headers of the console table
_ONE_LINE = {"no_wrap": True, "overflow": "ignore", "crop": False}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of one step.

    Attributes:
        step: number of the step; 0 for what was measured before the first.
        values: flat names -> numbers; a quantity that does not exist this step is left out.
    """

    step: int
    values: Mapping[str, float]


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


class MetricsLog:
    """Writes the metrics of a run. On ranks other than 0 it does nothing.

    A resumed run continues the files: lines of steps after the checkpoint, written by the interrupted run, are dropped.

    Args:
        section: the recipe's ``logger``, which names the run directory.
        columns: columns of the console table.
        max_num_steps: number of steps that the run takes, for the progress bar.
        first_step: the step that the run continues after.
        enabled: whether this rank writes.
    """

    def __init__(
        self, section: Logger, columns: Sequence[Column], max_num_steps: int, first_step: int, *, enabled: bool
    ) -> None:
        self.enabled = enabled
        self.console = Console(quiet=not enabled)
        self._columns, self._rows = columns, 0
        if not enabled:
            return
        directory = Path(section.log_dir)
        self._path = directory / METRICS_FILE
        _keep_steps(self._path, first_step)
        self._writer = None
        if section.tensorboard_enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=self.console
        )
        self._task = self._progress.add_task("", total=max_num_steps, completed=first_step)

    def __enter__(self) -> MetricsLog:
        if self.enabled:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._progress.stop()
            if self._writer is not None:
                self._writer.close()

    def log(self, metrics: StepMetrics) -> None:
        """Write the metrics of one step everywhere: file, TensorBoard, console."""
        if not self.enabled:
            return
        values = metrics.values
        with self._path.open("a") as file:
            file.write(json.dumps({"step": metrics.step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, metrics.step)
        if any(column.metric in values for column in self._columns):
            self._row(metrics.step, values)
        self._progress.update(self._task, completed=metrics.step)

    def examples(self, rollouts: Sequence[Rollout]) -> None:
        """Print question, response and reference answer of a few rollouts."""
        for rollout in rollouts:
            sample = rollout.prompt.sample
            self.note(f"  {sample.task}: {sample.question!r} -> {rollout.text!r} (reference {sample.answer!r})")

    def note(self, text: str) -> None:
        """Print one line above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        if self._rows % HEADER_PERIOD == 0:
            self.console.print(
                "  ".join([f"{'step':>5}", *(f"{c.heading:>9}" for c in self._columns)]), style="bold", **_ONE_LINE
            )
        self._rows += 1
        cells = [f"{format(values[c.metric], c.spec):>9}" if c.metric in values else " " * 9 for c in self._columns]
        self.console.print("  ".join([f"{step:>5}", *cells]), highlight=False, **_ONE_LINE)


def _keep_steps(path: Path, last: int) -> None:
    """Keep the lines of steps up to ``last``; none where the run starts anew, which logs its step 0 again."""
    if not path.exists():
        return
    # A line without its end is what a killed run had begun to write.
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= last] if last > 0 else []
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
