# SPDX-License-Identifier: Apache-2.0
"""Claim: processes that share a session build once what they share, and after a failure again."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.common.once import built_once


def factory_of(folder: Path) -> Any:
    return SimpleNamespace(getbasetemp=lambda: folder)


def ask(root: Path, number: int) -> None:
    """As a process of pytest-xdist."""
    os.environ["PYTEST_XDIST_WORKER"] = f"gw{number}"

    def build(folder: Path) -> None:
        time.sleep(0.2)  # the others ask meanwhile
        (folder / "builder").write_text(str(number))

    own = root / f"popen-gw{number}"
    own.mkdir()
    (own / "seen").write_text((built_once(factory_of(own), "it", build) / "builder").read_text())


def test_one_process_builds_and_all_have_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seen = [(tmp_path / f"popen-gw{number}" / "seen").read_text() for number in range(4)]
    assert len(set(seen)) == 1


def test_what_failed_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("a full disk")

    def succeeds(folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(OSError, match="a full disk"):
        built_once(factory_of(tmp_path), "it", fails)
    assert [path.name for path in built_once(factory_of(tmp_path), "it", succeeds).iterdir()] == ["whole"]
    built_once(factory_of(tmp_path), "it", fails)  # it is there
