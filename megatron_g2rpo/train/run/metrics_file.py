# SPDX-License-Identifier: Apache-2.0
"""``metrics.jsonl``, a JSON object per step: written line by line, and cut back to the step that a run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_g2rpo.train.run.files import replace_bytes
from megatron_g2rpo.weights.files import naming

METRICS_FILE = "metrics.jsonl"


class MetricsFileError(ValueError):
    """A line of the file is none that a run wrote."""


def append(path: Path, step: int, values: Mapping[str, float]) -> None:
    """Add the line of a step, and wait until it is on the disk: the checkpoint of the step must not be there without.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with naming(path), path.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def last_step(path: Path) -> int:
    """Return the last step that was logged; 0 where there is none.

    Raises:
        MetricsFileError: see ``keep_steps``.
    """
    return max((step for step, _ in _lines(path)), default=0)


def missing_steps(path: Path, last: int) -> list[int]:
    """Return which steps, of those from 1 to ``last``, have no line.

    Raises:
        MetricsFileError: see ``keep_steps``.
    """
    there = {step for step, _ in _lines(path)}
    return [step for step in range(1, last + 1) if step not in there]


def keep_steps(path: Path, last: int) -> None:
    """Keep the lines of steps up to ``last``; -1: none.

    Raises:
        MetricsFileError: a line is none that a run wrote; names file and line. The file is left as it is.
    """
    if path.exists():
        kept = [line for step, line in _lines(path) if step <= last]
        replace_bytes(path, b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Iterate over steps and their lines; what a killed run had begun to write, a line without its end, is left out."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            step = json.loads(line)["step"]
            if not isinstance(step, int):
                raise TypeError(f"step {step!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsFileError(
                f"{path}, line {number}: {line[:40]!r} is no JSON object of a step's metrics; an editor, or a machine "
                "that lost power, left it there: remove the line, and start the command again"
            ) from error
        yield step, line
