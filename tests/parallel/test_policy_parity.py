# SPDX-License-Identifier: Apache-2.0
"""Claim: no layout changes what the policy computes (against one transformers process on unpacked inputs).

The matrix is in ``tests.parallel.layouts``, the comparison in ``tests.layout_parity``. One launch a world: starting
eight ranks takes longer than any check. With ``-s`` the largest errors of every layout are shown.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import torchrun
from tests.layout_parity import prepare
from tests.parallel.layouts import WORLDS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def check_world(directory: Path, world: str) -> None:
    ranks, cases = WORLDS[world]
    for case in cases:
        prepare(directory, case)
    output = torchrun(ranks, "-m", "tests.parallel.parity_worker", str(directory), world, timeout=1200)
    for case in cases:
        (line,) = [line for line in output.splitlines() if line.startswith(f"parity ok [{case}]")]
        print(line)


@pytest.mark.parametrize("world", [name for name in WORLDS if name.startswith("fast")])
def test_every_layout_computes_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [name for name in WORLDS if name.startswith("full")])
def test_wider_layouts_compute_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)
