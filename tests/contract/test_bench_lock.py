# SPDX-License-Identifier: Apache-2.0
"""Claim: ``benchmarks/step`` compares with TRL in the package's own environment, but for what TRL needs beside it."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_g2rpo.commands.doctor.lock import read_lock

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmarks_versions_are_those_of_the_tests() -> None:
    ours, theirs = (read_lock(ROOT / "constraints" / name) for name in ("cpu.txt", "bench.txt"))
    differing = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert not differing
    assert {"torch", "transformers", "megatron-core", "trl"} <= ours.keys() & theirs.keys()


def test_the_makefile_installs_what_is_pinned() -> None:
    lock, makefile = read_lock(ROOT / "constraints" / "bench.txt"), (ROOT / "Makefile").read_text()
    line = re.search(r"-c constraints/bench\.txt \\\n(.*)", makefile)
    assert line is not None
    asked = dict(re.findall(r"([\w-]+)==([\w.]+)", line[1]))
    assert asked.keys() == {"torch", "trl", "torchvision"}
    assert all(lock[name] == version for name, version in asked.items())
    assert "$(BENCH_VENV)" in makefile.partition("\nclean:")[2]
