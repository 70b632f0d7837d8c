# SPDX-License-Identifier: Apache-2.0
"""The run's side of its trackers: starts a process for each, hands it what is logged, and waits for none of them.

A line goes into a queue, from which a thread writes it to the process. Where a library hangs, the queue fills, and what
does not fit is dropped; where it fails, its process ends. Either is said once, and ``metrics.jsonl`` has it all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_g2rpo.processes.kept import Kept
from megatron_g2rpo.recipe.run_sections import Logger

# Lines that wait for a tracker: hours of steps, or what a validation of thousands of samples has.
QUEUE_LINES = 1024
# Seconds that all trackers together have at the end of a run, and where an error has ended it.
FINISH_S, FINISH_AFTER_ERROR_S = 30.0, 10.0
# Seconds that a tracker has once the run is gone.
ORPHANED_S = 10.0
_SHOWN_CHARACTERS = 300


class TrackerError(ValueError):
    """A tracker that the recipe asks for is not installed."""


def enabled(section: Logger) -> list[str]:
    """Return the names of the trackers that a recipe's ``logger`` turns on: of their keys, packages and extras."""
    return [name for name in ("wandb", "trackio") if getattr(section, f"{name}_enabled")]


def require(section: Logger) -> None:
    """Check that the trackers of a recipe are installed; nothing is imported.

    Raises:
        TrackerError: one is not; says what to install, or which key to change.
    """
    for name in enabled(section):
        if importlib.util.find_spec(name) is None:
            raise TrackerError(
                f"logger.{name}_enabled is true, and the package {name} is not installed: "
                f"pip install 'megatron-g2rpo[{name}]', or set logger.{name}_enabled=false"
            )


class Trackers:
    """The trackers of a run.

    Args:
        section: the recipe's ``logger``.
        config: the resolved recipe, plain values.
        run_id: id of the run, the same in every attempt; empty where nobody has claimed the directory.
    """

    def __init__(self, section: Logger, config: Mapping[str, Any], run_id: str) -> None:
        self._feeds = [_Feed(name, section, config, run_id) for name in enabled(section)]
        self._told_end = False

    def start(self) -> None:
        """Start the processes; one that cannot be started is news."""
        for feed in self._feeds:
            feed.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the numbers of a step."""
        for feed in self._feeds:
            feed.put({"step": step, "metrics": dict(values)})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand on samples of a step, plain values, before its numbers."""
        if rows:
            for feed in self._feeds:
                feed.put({"step": step, "samples": list(rows)})

    def news(self) -> Iterator[str]:
        """Iterate over lines for the user that were not there before."""
        for feed in self._feeds:
            yield from feed.news()

    def say_end(self, *, failed: bool) -> Iterator[str]:
        """Tell the trackers that nothing more will be logged, and wait for none; iterate over lines for the user.

        Args:
            failed: whether an error ended the run.
        """
        if self._told_end:
            return
        yield from self.news()  # before they are told to end, which is none
        self._told_end = True
        for feed in self._feeds:
            feed.say_end(failed)

    def finish(self, *, failed: bool) -> Iterator[str]:
        """End the trackers, after seconds at most; iterate over lines for the user.

        Args:
            failed: whether an error ended the run.
        """
        yield from self.say_end(failed=failed)
        deadline = time.monotonic() + (FINISH_AFTER_ERROR_S if failed else FINISH_S)
        for feed in self._feeds:
            yield from feed.finish(deadline)


class _Feed:
    """One tracker, and the thread that writes to it."""

    def __init__(self, name: str, section: Logger, config: Mapping[str, Any], run_id: str) -> None:
        self.name = name
        folder = Path(section.log_dir) / "trackers"
        self.output = folder / f"{name}.log"
        settings = getattr(section, name)
        self._identity = {
            "project": settings.project,
            "name": settings.name,
            "entity": getattr(settings, "entity", None),
            "id": run_id or uuid.uuid4().hex,
            "directory": section.log_dir,
            "config": config,
        }
        self._record = folder / f"{name}-{self._identity['id'][:8]}.step"
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE_LINES)
        self._process: Kept | None = None
        self._thread = threading.Thread(target=self._write, name=f"tracker {name}", daemon=True)
        self._dropped, self._said_dropped, self._said_ended = 0, False, False
        self._not_started = ""

    def start(self) -> None:
        worker = [sys.executable, "-m", "megatron_g2rpo.train.run.trackers.worker", self.name, str(self._record)]
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._process = Kept(worker, self.output, grace_s=ORPHANED_S)
        except OSError as error:
            self._not_started = str(error)
            return
        self.put(self._identity)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def news(self) -> Iterator[str]:
        if not self._said_ended and (why := self._why_ended()):
            self._said_ended = True
            yield f"warning: {self.name} has ended, and the run goes on without it: {why}"
        if self._dropped and not self._said_dropped and not self._said_ended:
            self._said_dropped = True
            yield (
                f"warning: {self.name} does not keep up, and from now on is not told what its queue of {QUEUE_LINES} "
                f"lines has no room for; metrics.jsonl has it. Its process says: {self._last_line()}"
            )

    def say_end(self, failed: bool) -> None:
        with contextlib.suppress(queue.Full):  # of one that hangs, and is given up on
            self._queue.put_nowait({"end": failed})

    def finish(self, deadline: float) -> Iterator[str]:
        if self._process is None:
            return
        code = self._process.wait(max(0.0, deadline - time.monotonic()))
        self._process.end()
        if code is None:
            yield f"warning: {self.name} did not finish in time and was ended; its last words: {self._last_line()}"
        elif code and not self._said_ended:
            yield f"warning: {self.name} lacks some of the run: {self._last_line()}"

    def _why_ended(self) -> str:
        if self._process is None:
            return self._not_started
        code = self._process.poll()
        return "" if code is None else f"exit code {code}; {self._last_line()}"

    def _last_line(self) -> str:
        """The last line that the tracker's process wrote, and where the others are."""
        try:
            lines = self.output.read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        return f"{last.strip()[:_SHOWN_CHARACTERS]!r} ({self.output})"

    def _write(self) -> None:
        assert self._process is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # a process that has ended is seen by `poll`
            while True:
                line = self._queue.get()
                pipe.write(f"{json.dumps(line)}\n".encode())
                pipe.flush()
                if "end" in line:
                    return
