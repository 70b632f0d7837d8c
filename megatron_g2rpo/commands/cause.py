# SPDX-License-Identifier: Apache-2.0
"""Which of a job's failed ranks is the cause: most others fail because of it, in the collective that they waited in."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_g2rpo import progress
from megatron_g2rpo.train.run.watchdog import HangError, is_lost_peer

# Keys of the record that a rank leaves.
TIME, KIND = "time", "kind"
_VERDICT, _CAUSE, _CONSEQUENCE = "verdict", "cause", "consequence"


def kind(error: BaseException) -> str:
    """Return what an error is to the job: its verdict on itself, a cause, or the consequence of another's end."""
    if isinstance(error, HangError):
        return _VERDICT
    return _CONSEQUENCE if is_lost_peer(error) else _CAUSE


@contextmanager
def marks() -> Iterator[Path]:
    """Give the ranks that are launched in the body a folder for where they are (``progress``), until it ends."""
    with tempfile.TemporaryDirectory(prefix="megatron-g2rpo-") as folder:
        os.environ[progress.LEFT] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[progress.LEFT]


def first(failures: Mapping[int, ProcessFailure], folder: Path) -> str:
    """Return the message of the rank that is the cause; of one that died without a word, where it was.

    Args:
        failures: rank -> how it ended.
        folder: see ``marks``.
    """
    rank = min(failures, key=lambda rank: (*_precedence(failures[rank]), rank))
    failure = failures[rank]
    if failure.error_file_data.get(KIND) == _VERDICT:
        return failure.message
    if TIME in failure.error_file_data:
        return f"rank {rank}: {failure.message}"
    where = progress.left(folder, rank)
    why = failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return f"rank {rank}{f' ({where})' if where else ''} ended without a message ({why})"


def _precedence(failure: ProcessFailure) -> tuple[int, float]:
    """Order of causes: a verdict on the job, a death without a word, a message, what follows from another's end.

    What waits in a collective of NCCL aborts when its peer is gone, and torchrun ends the others with SIGTERM.
    """
    record = failure.error_file_data
    if TIME in record:
        order = {_VERDICT: 0, _CAUSE: 2, _CONSEQUENCE: 4}
        return order[record.get(KIND, _CAUSE)], record[TIME]
    return {-signal.SIGABRT: 3, -signal.SIGTERM: 5}.get(failure.exitcode, 1), 0.0
