# SPDX-License-Identifier: Apache-2.0
"""Small files of a run directory: whole or as before, and named where they cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_g2rpo.weights.files import naming

PARTIAL = ".partial"
PROBE = ".writable-"  # what the names of the files begin with that `check_writable` creates and removes


def replace_bytes(path: Path, data: bytes) -> None:
    """Give a file new contents. Whatever happens, it holds the old or the new ones, whole.

    Raises:
        OSError: they cannot be written; the file is as before, and named.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def check_writable(directory: Path, key: str) -> None:
    """Create a file in a directory, write to it, and remove it.

    Raises:
        OSError: that is not possible; names the recipe's key and the directory.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=PROBE) as file:
            file.write(b"?")
            file.flush()
    except OSError as error:
        raise OSError(f"{key}: {directory} cannot be written to: {error.strerror}") from error
