# SPDX-License-Identifier: Apache-2.0
"""Everything that one GPU can show, in under ten minutes: python -m tests.gpu.on_a_card [--out FILE]

Runs the part of this folder's tests that one GPU can run, then measures parity with transformers, time and memory; the
end is a table, and a JSON file for a report. Installs and builds nothing: run it from the repository's root, in the
environment that trains, with the quickstart's data there (``make data``). Exit status 1: something failed.

On the virtual GPU it runs too (``python -m tests.gpu.virtual_cuda python -m tests.gpu.on_a_card``), which tests this
script; seconds and bytes are then the host's, or nothing at all, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.table import Table

from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.machine import installed_version
from tests.gpu.devices import TRANSFORMER_ENGINE, VIRTUAL
from tests.gpu.measurements import QUICKSTART, Measured, parity, quickstart, random_policy

SUITE_SECONDS = 330
DATA = Path("data/quickstart/card.json")


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "virtual": VIRTUAL,
        "memory": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron_core": version("megatron-core"),
        "transformer_engine": installed_version("transformer_engine") if TRANSFORMER_ENGINE else None,
    }


def suite() -> dict[str, Any]:
    """Run the tests of this folder that one GPU can run; count them, and the reasons of those skipped."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "not full", f"--junitxml={results}"]
        try:
            done = subprocess.run(command, timeout=SUITE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"status": 124, "tests": 0, "failed": [], "skipped": {}}
        cases = list(ElementTree.parse(results).iter("testcase"))
    skipped = Counter(str(skip.get("message")) for case in cases for skip in case.iter("skipped"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"status": done.returncode, "tests": len(cases), "failed": failed, "skipped": dict(skipped)}


def measure(directory: Path, steps: int) -> dict[str, Any]:
    """Return errors of parity, and what was measured beside ``plan`` in so many steps."""
    device = select("gpu")
    init_process_group(device)
    engines = (False, True) if TRANSFORMER_ENGINE else (False,)
    found: list[Measured | None] = []
    errors = parity(directory, device, engine=TRANSFORMER_ENGINE)
    for engine in engines:
        scratch = directory / str(engine)
        scratch.mkdir()
        found.append(quickstart(device, steps, engine=engine, small=VIRTUAL))
        torch.cuda.empty_cache()
        found.append(random_policy(scratch, device, steps, engine=engine, small=VIRTUAL))
        torch.cuda.empty_cache()
    return {"parity": errors, "measured": [asdict(each) for each in found if each is not None]}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    facts = report["machine"]
    on = f"{facts['device']}, torch {facts['torch']}, Transformer Engine {facts['transformer_engine'] or 'not there'}"
    ran = report.get("suite")
    if ran is not None:
        tests = Table(title=f"Tests on {on}", title_justify="left")
        tests.add_column("result")
        tests.add_column("number", justify="right")
        tests.add_row("ran out of time" if ran["status"] == 124 else "run", str(ran["tests"]))
        tests.add_row("failed", str(len(ran["failed"])))
        for reason, number in ran["skipped"].items():
            tests.add_row(f"skipped: {reason}", str(number))
        console.print(tests)
    errors = Table(title="Parity with transformers: largest errors", title_justify="left")
    for name in ("case", "error of", "largest", "allowed"):
        errors.add_column(name, justify="left" if name in ("case", "error of") else "right")
    for row in report["parity"]:
        style = None if row["error"] <= row["tolerance"] else "red"
        errors.add_row(row["case"], row["kind"], f"{row['error']:.1e}", f"{row['tolerance']:.1e}", style=style)
    console.print(errors)
    virtual = " (virtual: time is the host's, there is no memory to measure)" if facts["virtual"] else ""
    costs = Table(title=f"Time and memory on {on}{virtual}", title_justify="left")
    for name in ("what", "s/step", "tokens/s", "peak, GB", "plan, GB", "peak/plan"):
        costs.add_column(name, justify="left" if name == "what" else "right")
    for each in report["measured"]:
        peak = (
            ("-", "-") if facts["virtual"] else (f"{each['peak'] / 1e9:.2f}", f"{each['peak'] / each['planned']:.2f}")
        )
        rate, planned = f"{each['tokens_per_second']:,.0f}", f"{each['planned'] / 1e9:.2f}"
        costs.add_row(each["what"], f"{each['seconds']:.3f}", rate, peak[0], planned, peak[1])
    console.print(costs)


def succeeded(report: dict[str, Any]) -> bool:
    """Whether all tests passed, and every error is within its tolerance."""
    tests = report.get("suite")
    right = all(row["error"] <= row["tolerance"] for row in report["parity"])
    return right and (tests is None or tests["status"] == 0)


def main() -> None:
    """Run the tests, measure, write and show the report."""
    parser = argparse.ArgumentParser(description="What one GPU can show.")
    parser.add_argument("--out", type=Path, default=Path("on_a_card.json"))
    parser.add_argument("--no-suite", action="store_true", help="only measure")
    parser.add_argument("--steps", type=int, default=6, help="to measure, at least 2: the first is not counted")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    if not torch.cuda.is_available():
        sys.exit(
            "error: torch sees no GPU; install a CUDA build of torch (docs/install-gpu.md), or test this script with "
            "python -m tests.gpu.virtual_cuda python -m tests.gpu.on_a_card"
        )
    if not (QUICKSTART.exists() and DATA.exists()):
        sys.exit(f"error: {QUICKSTART} or {DATA} is not there: run it from the repository's root, after `make data`")
    report: dict[str, Any] = {"machine": machine()}
    if not arguments.no_suite:
        report["suite"] = suite()
    with tempfile.TemporaryDirectory() as folder:
        report.update(measure(Path(folder), arguments.steps))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report, Console(width=140))
    print(f"wrote {arguments.out}")
    sys.exit(0 if succeeded(report) else 1)


if __name__ == "__main__":
    main()
