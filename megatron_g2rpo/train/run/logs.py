# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl, TensorBoard, and the console's progress bar and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.recipe.run_sections import Logger
from megatron_g2rpo.train.run import event_files, metrics_file
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.types import Rollout
from megatron_g2rpo.weights.files import naming

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

    A resumed run continues the files: what the interrupted run wrote of steps after the checkpoint is dropped.

    Args:
        section: the recipe's ``logger``, which names the run directory.
        columns: columns of the console table.
        max_num_steps: number of steps that the run takes, for the progress bar.
        logged_step: the last step whose metrics stay; -1: none, of a run that starts anew.
        enabled: whether this rank writes.

    Raises:
        MetricsFileError: ``metrics.jsonl`` is damaged; names the line.
        OSError: a file cannot be written; names it.
    """

    def __init__(
        self, section: Logger, columns: Sequence[Column], max_num_steps: int, logged_step: int, *, enabled: bool
    ) -> None:
        self.enabled = enabled
        self.console = Console(quiet=not enabled)
        self._columns, self._rows = columns, 0
        if not enabled:
            return
        directory = Path(section.log_dir)
        self._path = directory / METRICS_FILE
        metrics_file.keep_steps(self._path, logged_step)
        self._writer, self._events = None, directory / "tensorboard"
        if section.tensorboard_enabled:
            from torch.utils.tensorboard import SummaryWriter

            event_files.keep_steps(self._events, logged_step)
            # A TensorBoard that is running has read what was dropped, and drops it at the mark of a restart.
            with naming(self._events):
                self._writer = SummaryWriter(str(self._events), purge_step=logged_step + 1)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=self.console
        )
        self._task = self._progress.add_task("", total=max_num_steps, completed=max(logged_step, 0))

    def __enter__(self) -> MetricsLog:
        if self.enabled:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._progress.stop()
            # Where something has failed, such as a full disk, that is what the user must read.
            with naming(self._events), suppress(*(() if error is None else (OSError,))):
                if self._writer is not None:
                    self._writer.close()

    def log(self, metrics: StepMetrics) -> None:
        """Write the metrics of one step everywhere: file, TensorBoard, console.

        Raises:
            OSError: a file cannot be written; names it.
        """
        if not self.enabled:
            return
        values = metrics.values
        metrics_file.append(self._path, metrics.step, values)
        if self._writer is not None:
            with naming(self._events):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, metrics.step)
                self._writer.flush()  # before the step's checkpoint: a killed run does not log it again
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
