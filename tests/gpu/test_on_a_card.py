# SPDX-License-Identifier: Apache-2.0
"""Claims: the script for a card measures what it says, marks what is virtual, and fails where an error is too large."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.devices import TRANSFORMER_ENGINE, VIRTUAL
from tests.gpu.on_a_card import DATA, succeeded


@pytest.mark.timeout(900)  # with Transformer Engine on a CPU it takes minutes
@pytest.mark.skipif(not DATA.exists(), reason="needs the quickstart's data: make data")
def test_the_script_measures_and_says_on_what(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.gpu.on_a_card", "--no-suite", "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["machine"]["virtual"] == VIRTUAL == ("(virtual: " in done.stdout)
    engine = {"transformer_engine, float32", "transformer_engine, bfloat16"} if TRANSFORMER_ENGINE else set()
    assert {row["case"] for row in report["parity"]} == {"local, float32"} | engine
    assert {"logprob", "grad_norm"} <= {row["kind"] for row in report["parity"]}
    assert all(0.0 <= row["error"] <= row["tolerance"] for row in report["parity"])
    assert len(report["measured"]) == 2 * (1 + TRANSFORMER_ENGINE)
    for each in report["measured"]:
        assert each["seconds"] > 0.0
        assert each["tokens_per_second"] > 0.0
        assert each["planned"] > 0
        assert VIRTUAL or 0.2 < each["peak"] / each["planned"] < 1.3
        assert each["what"].split(",")[0] in done.stdout


@pytest.mark.parametrize("error", [2e-5, math.nan])
def test_an_error_above_its_tolerance_fails(error: float) -> None:
    row = {"case": "local, float32", "kind": "logprob", "error": 1e-6, "tolerance": 1e-5}
    passed = {"status": 0, "tests": 1, "failed": [], "skipped": {}}
    assert succeeded({"parity": [row], "suite": passed})
    assert not succeeded({"parity": [row, {**row, "error": error}], "suite": passed})
    assert not succeeded({"parity": [row], "suite": {**passed, "status": 1}})
