# SPDX-License-Identifier: Apache-2.0
"""One rank of test_ranks.py: plans against real policies, one layout after the other. Usage: DIRECTORY [WORD...]

The directory holds the tiny models; words restrict the cases to those whose name has all of them. Every rank reports
what is wrong in each case.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_g2rpo.plan.buffers import model_state
from megatron_g2rpo.plan.kept import element_bytes, kept_of_row
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.rows import MicroBatches, Row
from megatron_g2rpo.plan.wire import OPTIMIZER_STEP, ROLLOUT_STEP, Traffic, stage_traffic
from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.layouts.layout import layout_of
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.types import PackedBatch
from tests.common.launch import report_result
from tests.unit.plan.measured import (
    MEGATRON,
    REDUCTION,
    batch_of,
    policy_of,
    row_of,
    saved_bytes,
    shape_of,
    state_bytes,
    tiny_recipe,
    toy_loss,
    watched_wire,
)

TENSOR, CONTEXT = f"{MEGATRON}tensor_model_parallel_size=2", f"{MEGATRON}context_parallel_size=2"
PIPELINE = f"{MEGATRON}pipeline_model_parallel_size=2"
SEQUENCE, DISTRIBUTED = f"{MEGATRON}sequence_parallel=true", f"{REDUCTION}use_distributed_optimizer=true"
OVERLAP = f"{REDUCTION}overlap_grad_reduce=true"
FULL, SELECTIVE = f"{MEGATRON}recompute_granularity=full", f"{MEGATRON}recompute_granularity=selective"
FLOAT32 = "policy.precision=float32"

CASES: list[tuple[str, list[str]]] = [
    ("tied", [FLOAT32, TENSOR]),
    ("untied", [TENSOR, SEQUENCE, DISTRIBUTED]),
    ("one_kv_head", [FLOAT32, TENSOR, SEQUENCE]),
    ("tied", [FLOAT32, TENSOR, SEQUENCE, FULL]),
    ("untied", [FLOAT32, DISTRIBUTED, OVERLAP]),
    ("tied", [DISTRIBUTED]),
    ("untied", [FLOAT32]),
    ("tied", [FLOAT32, CONTEXT]),
    ("tied", [CONTEXT]),
    ("untied", [CONTEXT, SELECTIVE, DISTRIBUTED]),
    ("tied", [FLOAT32, PIPELINE]),
    ("tied", [PIPELINE, DISTRIBUTED]),
    ("untied", [FLOAT32, PIPELINE, FULL, f"{MEGATRON}num_layers_in_first_pipeline_stage=3"]),
]

# Kept activations are derived to the byte, as in one process, but a plan takes the largest share of everything, and
# different context-parallel ranks may have those of images, of placeholders and of labels.
KEPT = 5e-3
# A plan leaves small messages out. The tensors here are small enough for norms' gradients to be no larger than those.
SENT, SMALL = 5e-3, 10_000

# One row of sequences by themselves, and one of groups that share their prompts.
ROWS = {"": ((((8, 8),), ((6, 10), (4, 4)), ()), 150, 20, 1), "shared: ": ((((8, 8),), ((6, 10),), ()), 90, 40, 4)}


def check(directory: Path, shape: str, overrides: list[str]) -> dict[str, tuple[Any, Any]]:
    """A plan of one layout and the policy of this rank: what they say of the same, (planned, real), for both rows."""
    recipe = tiny_recipe(directory / shape, *overrides, world=dist.get_world_size(), kind="train")
    policy = policy_of(recipe)
    layout, parallelism = shape_of(recipe)
    stage, rank = policy.groups.pipeline_rank, dist.get_rank(policy.groups.data_context)
    model = Model(read_config(recipe.policy.model_name))
    found: dict[str, tuple[Any, Any]] = {}
    for name, row in ROWS.items():
        batch = batch_of(model.config, layout, *row)
        found |= {f"{name}{what}": both for what, both in check_row(recipe, model, policy, batch).items()}
    with watched_wire(0) as stream:
        for _ in policy.stream():
            pass
    parameters = model.stage_parameters(layout_of(recipe.policy.megatron_cfg), stage, freeze_vision=False)
    state = model_state(parameters, parallelism, stage, nbytes=element_bytes(recipe), rank=rank)
    row = row_of(model.config, batch_of(model.config, layout, *ROWS[""]))
    traffic = stage_traffic(recipe, model, layout, batches_of(row), stage, passes=1)
    return {
        **found,
        "names": (
            [without_layer(p.name) for p in parameters],
            [without_layer(n) for n, _ in policy.model.named_parameters()],
        ),
        "state": ((state.weights, state.gradients, state.optimizer), state_bytes(policy)),
        "sent to the engine": (by_collective(traffic, ROLLOUT_STEP), pytest.approx(stream.sent, rel=SENT)),
    }


def batches_of(row: Row) -> MicroBatches:
    """Two micro-batches of a row."""
    tokens, images = 2 * row.tokens, 2 * len(row.images)
    return MicroBatches(row, count=2, tokens=tokens, computed=tokens, pairs=0, images=images, sequences=6)


def check_row(recipe: Recipe, model: Model, policy: MegatronPolicy, batch: PackedBatch) -> dict[str, tuple[Any, Any]]:
    """What one row keeps, and what a step on two of it sends."""
    layout, stage, row = layout_of(recipe.policy.megatron_cfg), policy.groups.pipeline_rank, row_of(model.config, batch)
    saved = most(saved_bytes(policy, batch), policy)
    kept = kept_of_row(recipe, model.config, layout, row, stage).total
    with watched_wire(SMALL) as steps:
        policy.logprobs([batch, batch])
        policy.update([batch, batch], toy_loss)
    traffic = stage_traffic(recipe, model, layout, batches_of(row), stage, passes=1)
    found: dict[str, tuple[Any, Any]] = {
        "sent in a step": (by_collective(traffic, OPTIMIZER_STEP), pytest.approx(steps.sent, rel=SENT))
    }
    if recipe.policy.megatron_cfg.recompute_granularity is None:  # else see saved_bytes
        found["kept"] = (kept, pytest.approx(saved, rel=KEPT))
    return found


def without_layer(name: str) -> str:
    """Layers of a policy count from its stage's first, those of a plan from the model's."""
    return re.sub(r"decoder\.layers\.\d+", "decoder.layers", name)


def most(size: int, policy: MegatronPolicy) -> int:
    """The largest among the ranks of this stage."""
    sizes = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([policy.groups.pipeline_rank, size]))
    return max(int(of) for stage, of in sizes if int(stage) == policy.groups.pipeline_rank)


def by_collective(traffic: list[Traffic], per: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for line in traffic:
        if line.per == per:
            sums[line.collective] = sums.get(line.collective, 0.0) + line.sent
    return sums


def case_name(shape: str, overrides: list[str]) -> str:
    """The shape, then keys and values without their sections."""
    return " ".join([shape, *(override.rpartition(".")[2] for override in overrides)])


def main() -> None:
    directory, *words = sys.argv[1:]
    init_process_group(select("cpu"))
    wrong: dict[str, list[str]] = {}
    for shape, overrides in CASES:
        name = case_name(shape, overrides)
        if not all(word in name for word in words):
            continue
        wrong[name] = [
            f"{what}: planned {planned}, is {real}"
            for what, (planned, real) in check(Path(directory), shape, overrides).items()
            if planned != real
        ]
        process_groups.reset()
    report_result(wrong)


if __name__ == "__main__":
    main()
