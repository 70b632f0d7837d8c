# SPDX-License-Identifier: Apache-2.0
"""Claim: on a GPU neither layouts nor layers nor fusions change what the policy computes (transformers on the CPU).

Local layers in float32 keep the CPU's tolerances. Transformer Engine's layers keep them where its attention exists in
float32, and in bfloat16 they are as near to float32 as transformers' bfloat16 is (``layout_parity.TOLERANCES``). The
matrix is in ``tests.gpu.layouts``; one launch a world. With ``-s`` the largest errors of every layout are shown.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_g2rpo.policy.machine import optional_packages
from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.common.layout_parity import prepare
from tests.gpu.layouts import WORLDS as GPU_WORLDS
from tests.parallel.layouts import WORLDS as CPU_WORLDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_engine = pytest.mark.skipif(not optional_packages()["transformer_engine"], reason="needs Transformer Engine")
FAST = [name for name in GPU_WORLDS if "fast" in name]
FULL = [name for name in GPU_WORLDS if "full" in name]


def check_world(directory: Path, world: str) -> None:
    ranks, cases = {**CPU_WORLDS, **GPU_WORLDS}[world]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    fusions = {fusion for case in cases for fusion in case.fusions}
    virtual = os.environ.get("VIRTUAL_CUDA") == "1"
    if "gradient_accumulation_fusion" in fusions and not virtual and not optional_packages()["apex_wgrad"]:
        pytest.skip("needs fused_weight_gradient_mlp_cuda of NVIDIA apex")
    for case in cases:
        prepare(directory, case)
    everyone = torchrun_json(
        ranks, "tests.parallel.parity_worker", str(directory), world, timeout=1700, **environment(world)
    )
    for rank, results in enumerate(everyone):
        assert list(results) == [str(case) for case in cases]
        for case in cases:
            result = results[str(case)]
            report = Report(case.tolerances, result["worst"])
            if rank == 0:  # the others found the same: reports are merged
                print(f"parity on a GPU [{case}] {result['seconds']:.1f} s: {report}")
            report.assert_within_tolerance()


def environment(world: str) -> dict[str, str]:
    """What a world needs of the virtual GPU; a real one has its own packages, and compiles."""
    if os.environ.get("VIRTUAL_CUDA") != "1":
        return {}
    if not world.startswith("engine"):
        return {"VIRTUAL_TE": "0"}  # megatron-core takes the optimizer of Transformer Engine wherever it is
    if "fused" not in world:
        return {}
    # Nothing is compiled on it: the functions run as they are, megatron-core's own gradient of SwiGLU among them;
    # tests/unit/policy/test_activation.py compiles them for the CPU.
    apex = str(Path(__file__).parent / "apex")
    return {"PYTHONPATH": os.pathsep.join([apex, os.environ.get("PYTHONPATH", "")])}


def of(names: list[str]) -> list:
    """The worlds as parameters; those of Transformer Engine are skipped where it is absent.

    Others run without it, see ``environment``: once is enough.
    """
    without = pytest.mark.without_transformer_engine
    return [pytest.param(name, marks=needs_engine if name.startswith("engine") else without) for name in names]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", of(FAST))
def test_every_layout_computes_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", of([*FULL, *CPU_WORLDS]))
def test_the_whole_matrix_computes_what_transformers_computes(directory: Path, world: str) -> None:
    check_world(directory, world)
