# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run saved last, in its run directory: known also when the checkpoints are gone."""

from __future__ import annotations

from pathlib import Path

from megatron_g2rpo.train.run.files import replace_bytes

SAVED_FILE = ".saved"


def last_saved(directory: Path) -> int | None:
    """Return the step of the last checkpoint that a run saved, 0 if none; None if the run kept no record.

    Releases up to 0.4 kept none. A record that is damaged is none.
    """
    try:
        return int((directory / SAVED_FILE).read_text())
    except (OSError, ValueError):
        return None


def record_saved(directory: Path, step: int) -> None:
    """Write down that a run has saved the checkpoint of a step; 0: that it has saved none.

    Raises:
        OSError: that cannot be written; names the file.
    """
    replace_bytes(directory / SAVED_FILE, f"{step}\n".encode())
