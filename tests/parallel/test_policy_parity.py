# SPDX-License-Identifier: Apache-2.0
"""Claim: no layout changes what the policy computes (against one transformers process on unpacked inputs).

The matrix is in ``tests.parallel.layouts``, the comparison in ``tests.common.layout_parity``. One launch a world:
starting eight ranks takes longer than any check. With ``-s`` the largest errors of every layout are shown.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.layout_parity import prepare
from tests.parallel.layouts import WORLDS


def test_the_matrix_is_whole() -> None:
    """Every layout with and without the distributed optimizer; of two tensor-parallel ranks, sequence parallelism."""
    covered = {
        (case.tensor, case.pipeline, case.context, ranks // (case.tensor * case.pipeline * case.context), *switches)
        for name, (ranks, cases) in WORLDS.items()
        for case in cases
        for switches in (("sp", case.sequence_parallel), ("distopt", case.distributed_optimizer))
        if name.startswith("fast")
    }
    layouts = [layout for layout in itertools.product((1, 2), repeat=4) if 1 < math.prod(layout) <= 8]
    assert len(layouts) == 14
    on_or_off = itertools.product(layouts, ("sp", "distopt"), (False, True))
    missing = [
        (*layout, switch, on)
        for layout, switch, on in on_or_off
        if (*layout, switch, on) not in covered and not (switch == "sp" and on and layout[0] == 1)
    ]
    assert not missing


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def check_world(directory: Path, world: str) -> None:
    ranks, cases = WORLDS[world]
    for case in cases:
        prepare(directory, case)
    everyone = torchrun_json(ranks, "tests.parallel.parity_worker", str(directory), world, timeout=1200)
    for rank, results in enumerate(everyone):
        assert list(results) == [str(case) for case in cases]
        for case in cases:
            result = results[str(case)]
            report = Report(case.tolerances, result["worst"])
            if rank == 0:  # the others found the same: reports are merged
                print(f"parity [{case}] {result['seconds']:.1f} s: {report}")
            report.assert_within_tolerance()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [name for name in WORLDS if name.startswith("fast")])
def test_every_layout_computes_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [name for name in WORLDS if name.startswith("full")])
def test_wider_layouts_compute_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)
