# SPDX-License-Identifier: Apache-2.0
"""Where this process is: the step and the phase that it works on, and when it last got on.

Code that takes long says so here: ``enter`` at the start of a phase, which all ranks enter in the same order, and
``advance`` whenever a part of it is done, such as a micro-batch or a decoded token. ``train.run.watchdog`` tells from
this a slow rank from one that hangs, and a launcher what a rank was doing that died without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Environment variable: folder in which each rank of this machine leaves where it is, for its launcher.
LEFT = "MEGATRON_G2RPO_LEFT_MARKS"


@dataclass(frozen=True)
class Mark:
    """A place in the program.

    Attributes:
        step: number of the step, from 1; 0 before the first.
        phase: what the step, or the time before and after the steps, is at.
        number: number of phases that were entered; it is equal on ranks that are at the same place.
    """

    step: int = 0
    phase: str = "start"
    number: int = 0


_mark = Mark()
# Apart from the mark: any thread may advance it.
_time = time.monotonic()


def at() -> Mark:
    """Return where this process is."""
    return _mark


def enter(phase: str, *, step: int | None = None) -> None:
    """Say that a phase begins.

    Args:
        phase: its name, as metrics call it.
        step: number of the step; None: the one before.
    """
    global _mark
    _mark = Mark(_mark.step if step is None else step, phase, _mark.number + 1)
    advance()
    if folder := os.environ.get(LEFT):
        _leave(Path(folder))


def advance() -> None:
    """Say that a part of the phase's work was done; any thread may."""
    global _time
    _time = time.monotonic()


def idle() -> float:
    """Return the seconds since a part of the work was done."""
    return time.monotonic() - _time


def _leave(folder: Path) -> None:
    """Leave where this rank is for its launcher; a rank that is killed meanwhile leaves where it was."""
    partial = folder / f"{os.environ.get('RANK', '0')}.partial"
    with contextlib.suppress(OSError):  # a full disk under it: a message will say less, and the run goes on
        partial.write_text(json.dumps({**asdict(_mark), "host": socket.gethostname()}))
        partial.replace(partial.with_suffix(".json"))


def left(folder: Path, rank: int) -> str:
    """Return where a rank of this machine was, such as ``on HOST, step 3, phase update``; empty if it said nothing.

    Args:
        folder: what ``LEFT`` names.
        rank: global number of the rank.
    """
    try:
        mark = json.loads((folder / f"{rank}.json").read_text())
    except (OSError, ValueError):
        return ""
    return f"on {mark['host']}, step {mark['step']}, phase {mark['phase']}"
