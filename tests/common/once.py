# SPDX-License-Identifier: Apache-2.0
"""What takes long to build, and nobody changes: once for all processes that share the tests of a session."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder ``name`` of this session; the first process that asks for it builds it, the others wait.

    Args:
        factory: pytest's, which has a folder for each process of pytest-xdist inside of the session's.
        name: what tells it from the session's other folders.
        build: fills an empty folder. What it raises is raised here, and the next process tries again.
    """
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, built = root / f"shared-{name}", root / f"shared-{name}.built"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            built.touch()
    return folder
