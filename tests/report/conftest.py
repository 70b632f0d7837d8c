# SPDX-License-Identifier: Apache-2.0
"""These tests need a browser, and an environment of their own: ``make test-report`` installs both and runs them there.

Elsewhere they are not collected. Were selenium missing from theirs, pytest would find no test there: a failure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("selenium") else ["test_*.py"]

if not collect_ignore_glob:
    from megatron_g2rpo.report.page import write_page
    from tests.common.recorded_run import write_recorded_run
    from tests.report.browser import Browser

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "\u202egnol\u2066 \u0000\u001b[31m and after",
    "javascript:window.hacked=1 " + "y" * 100_000,
    "\u05e9\u05dc\u05d5\u05dd 123 \u0645\u0631\u062d\u0628\u0627",
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 80 steps with hostile answers in the last."""
    return write_recorded_run(tmp_path_factory.mktemp("report") / "run", texts=HOSTILE)


@pytest.fixture(scope="session")
def page(run: Path) -> Path:
    return write_page([run])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started
