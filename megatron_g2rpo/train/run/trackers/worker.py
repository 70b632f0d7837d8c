# SPDX-License-Identifier: Apache-2.0
"""The process of one tracker: reads a JSON object a line from standard input, and tells the tracker's library.

    python -m megatron_g2rpo.train.run.trackers.worker NAME RECORD

The first line is the run (``backends.Identity``); each further one is ``{"step": N, "metrics": {...}}``,
``{"step": N, "samples": [...]}``, or at last ``{"end": FAILED}``. Input that ends without it is that of a run that was
killed. RECORD is the file of the last step that was logged: what an earlier attempt logged is not logged again, because
no tracker takes a step back.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_g2rpo.processes import kept
from megatron_g2rpo.train.run.trackers.backends import BACKENDS, Backend, Identity

# Lines in a row that the library fails at, after which the tracker gives up.
MOST_FAILURES = 10
NOT_STARTED, SOME_FAILED, GAVE_UP = 3, 4, 5


def work(lines: Iterable[str], make: Callable[[Identity], Backend], record: Path) -> int:
    """Tell a tracker what the lines say; the exit code of its process.

    Args:
        lines: JSON objects, see above.
        make: begins the run.
        record: file of the last step that was logged.
    """
    messages = map(json.loads, lines)
    try:
        backend = make(Identity(**next(messages)))
    except Exception:  # noqa: BLE001 (of a library and its server; the run is told by the exit code)
        traceback.print_exc()
        return NOT_STARTED
    # Of a step that was logged before, the table was, too.
    logged = _last_logged(record)
    failed, in_a_row, ended = 0, 0, True
    for message in messages:
        if "end" in message:
            ended = message["end"]
            break
        if message["step"] <= logged:
            continue
        try:
            _tell(backend, message)
            in_a_row = 0
        except Exception:  # noqa: BLE001 (as above; the next line may go through)
            traceback.print_exc()
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row == MOST_FAILURES:
                return GAVE_UP
        if "metrics" in message:
            _replace(record, f"{message['step']}\n")
    try:
        backend.finish(failed=ended)
    except Exception:  # noqa: BLE001 (as above)
        traceback.print_exc()
        failed += 1
    return SOME_FAILED if failed else 0


def _last_logged(record: Path) -> int:
    """The last step that an earlier attempt logged; -1: none, or nobody knows, which is said."""
    if not record.exists():
        return -1
    data = record.read_bytes()
    if re.fullmatch(rb"-?[0-9]+\n", data) is None:  # without its end, a number may be the beginning of another
        print(
            f"{record} is damaged ({data[:20]!r}), by a full disk or a machine that lost power: which steps are logged "
            "is not known, and some may be logged twice",
            file=sys.stderr,
            flush=True,
        )
        return -1
    return int(data)


def _tell(backend: Backend, message: dict[str, Any]) -> None:
    if "samples" in message:
        backend.samples(message["step"], message["samples"])
    else:
        backend.metrics(message["step"], message["metrics"])


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole whenever this process is killed, or the machine loses power."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the name may be there after a loss of power, and the text not
    partial.replace(path)


def main() -> int:
    """Be the process of the tracker that the command line names."""
    kept.die_with_parent()
    kept.outlast_signals()
    name, record = sys.argv[1:]
    return work(sys.stdin, BACKENDS[name], Path(record))  # lines of ASCII, as json.dumps writes them


if __name__ == "__main__":
    sys.exit(main())
