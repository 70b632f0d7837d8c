# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl, TensorBoard, the trackers, and the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console

from megatron_g2rpo.recipe.run_sections import Logger
from megatron_g2rpo.train.run import event_files, metrics_file
from megatron_g2rpo.train.run.console import Column, RunConsole
from megatron_g2rpo.train.run.examples import Example
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.train.run.stopping import RunStopped
from megatron_g2rpo.train.run.trackers.feed import Trackers
from megatron_g2rpo.weights.files import naming

__all__ = ["Column", "MetricsLog", "StepMetrics"]


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of one step.

    Attributes:
        step: number of the step; 0 for what was measured before the first.
        values: flat names -> numbers; a quantity that does not exist this step is left out.
    """

    step: int
    values: Mapping[str, float]


class MetricsLog:
    """Writes the metrics of a run. On ranks other than 0 it does nothing.

    A resumed run continues the files: what the interrupted run wrote of steps after the checkpoint is dropped.

    Args:
        section: the recipe's ``logger``, which names the run directory.
        columns: columns of the console table.
        max_num_steps: number of steps that the run takes, for the progress bar.
        logged_step: the last step whose metrics stay; -1: none, of a run that starts anew.
        enabled: whether this rank writes.
        trackers: the run's trackers; None: it has none.
        console: what the run is shown on; None: standard output.
        quiet: whether the console shows warnings alone.

    Raises:
        MetricsFileError: ``metrics.jsonl`` is damaged; names the line.
        OSError: a file cannot be written; names it.
    """

    def __init__(
        self,
        section: Logger,
        columns: Sequence[Column],
        max_num_steps: int,
        logged_step: int,
        *,
        enabled: bool,
        trackers: Trackers | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        self.enabled = enabled
        self._screen = RunConsole(
            columns, max_num_steps, max(logged_step, 0), console=console, quiet=quiet, enabled=enabled
        )
        self._ends = ExitStack()
        self._trackers = trackers if enabled else None
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

    def __enter__(self) -> MetricsLog:
        if self._trackers is not None:
            self._trackers.start()
        self._ends.enter_context(self._screen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()
        if not self.enabled:
            return
        if self._trackers is not None:
            for line in self._trackers.finish(failed=error is not None and not isinstance(error, RunStopped)):
                self.note(line)
        # Where something has failed, such as a full disk, that is what the user must read.
        with naming(self._events), suppress(*(() if error is None else (OSError,))):
            if self._writer is not None:
                self._writer.close()

    def log(self, metrics: StepMetrics) -> None:
        """Write the metrics of one step everywhere: file, TensorBoard, trackers, console.

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
        if self._trackers is not None:
            self._trackers.metrics(metrics.step, values)
            for line in self._trackers.news():
                self.note(line)
        self._screen.step(metrics.step, values)

    def examples(self, step: int, examples: Sequence[Example], shown: Sequence[Example]) -> None:
        """Give answers of a validation to the trackers, as a table, and print some of them.

        Args:
            step: number of the step that they were given after, which is logged next.
            examples: those for the trackers.
            shown: those for the console.
        """
        if self._trackers is not None:
            self._trackers.samples(step, [example.row() for example in examples])
        for example in shown:
            self.note(example.line)

    def complete(self) -> None:
        """Say that no step follows: trackers send what they have while the run does the last of its work."""
        if self._trackers is not None:
            for line in self._trackers.say_end(failed=False):
                self.note(line)

    def note(self, text: str) -> None:
        """Print one line above the live region."""
        self._screen.note(text)
