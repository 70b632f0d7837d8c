# SPDX-License-Identifier: Apache-2.0
"""Layouts that end-to-end runs are made at, and how the numbers of two runs are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

# Five significant digits: half a unit of the fifth.
FIVE_DIGITS = 5e-6
# A loss is a mean of terms of both signs and of size one, of which little may be left: 1e-4 has four digits in float32.
ROUNDING = 2e-8
TENSOR_PARALLEL = "policy.megatron_cfg.tensor_model_parallel_size"
LAYOUTS_OF_TWO = {
    "dp2": (),
    "tp2-sp": (f"{TENSOR_PARALLEL}=2", "policy.megatron_cfg.sequence_parallel=true"),
    "pp2": ("policy.megatron_cfg.pipeline_model_parallel_size=2",),
    "cp2": ("policy.megatron_cfg.context_parallel_size=2",),
}
DISTRIBUTED = tuple(
    f"policy.megatron_cfg.distributed_data_parallel_config.{key}=true"
    for key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
)
# One step and nothing around it.
BARE = ("grpo.max_num_steps=1", "grpo.val_at_start=false", "grpo.val_at_end=false", "checkpointing.export_hf=false")


def checkpoints(run: Path) -> list[str]:
    """Names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def assert_same_step(line: Mapping[str, float], expected: Mapping[str, float], tolerance: float) -> None:
    """Assert that two runs sampled the same groups in a step, and computed the same from them.

    Args:
        line, expected: the step's metrics in each.
        tolerance: largest relative difference.
    """
    exact = [name for name in expected if name.startswith("train/sampling/")]
    assert exact
    assert {name: line[name] for name in exact} == {name: expected[name] for name in exact}
    for name in ("train/loss", "train/grad_norm", "train/entropy", "train/reward"):
        same = math.isclose(line[name], expected[name], rel_tol=tolerance, abs_tol=ROUNDING)
        assert same, (name, line[name], expected[name])
    assert line["train/num_tokens"] == expected["train/num_tokens"]
