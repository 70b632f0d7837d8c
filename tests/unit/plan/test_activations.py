# SPDX-License-Identifier: Apache-2.0
"""Claim: the activations of a plan are what autograd keeps of the real policy's forward pass, and bound its peak."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from megatron_g2rpo.plan.working import update_working
from megatron_g2rpo.policy.layouts.layout import Layout
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.unit.plan.measured import (
    MEGATRON,
    Grids,
    batch_of,
    kept_bytes,
    peak_bytes,
    planned_bytes,
    policy_of,
    row_of,
    tiny_recipe,
    toy_loss,
)

# Every tensor is derived: the two are equal, but for four bytes a layer that a recomputed core attention is told.
TOLERANCE = 1e-4

# Images of each prompt, tokens of its text and of the responses, and how many responses share it.
ROWS: dict[str, tuple[Grids, int, int, int]] = {
    "text": (((), ()), 60, 40, 1),
    "images": ((((8, 8),), ((6, 10), (4, 4)), ()), 60, 40, 1),
    "one large image": ((((32, 32),),), 100, 200, 1),
    "shared prompts": ((((8, 8),), ((6, 10), (4, 4)), ()), 60, 40, 4),
    "one large image, shared": ((((32, 32),),), 100, 200, 3),
}
RECOMPUTE = {
    "none": [],
    "selective": [f"{MEGATRON}recompute_granularity=selective"],
    "full": [f"{MEGATRON}recompute_granularity=full", f"{MEGATRON}recompute_num_layers=2"],
    "full, block": [
        f"{MEGATRON}recompute_granularity=full",
        f"{MEGATRON}recompute_method=block",
        f"{MEGATRON}recompute_num_layers=3",
    ],
}
SHAPES = {
    "grouped heads": {},
    "one key/value head": {"kv_heads": 1, "tied": False},
    "no groups": {"kv_heads": 4, "head_dim": 24, "intermediate": 200, "vision_hidden": 48, "vision_depth": 2},
}


# Every shape, every way to recompute and both precisions, each beside several of the others: `full` has the rest.
EACH = {
    ("grouped heads", "none", "float32"),
    ("grouped heads", "selective", "bfloat16"),
    ("grouped heads", "full, block", "float32"),
    ("one key/value head", "none", "bfloat16"),
    ("one key/value head", "full", "float32"),
    ("no groups", "selective", "float32"),
    ("no groups", "full", "bfloat16"),
    ("no groups", "full, block", "bfloat16"),
}
ALL = [
    pytest.param(*case, marks=() if case in EACH else pytest.mark.full)
    for case in product(SHAPES, RECOMPUTE, ("float32", "bfloat16"))
]


@pytest.mark.parametrize(("shape", "recompute", "precision"), ALL)
def test_kept_activations(tmp_path: Path, shape: str, recompute: str, precision: str) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path, layers=4, **SHAPES[shape])  # type: ignore[arg-type]
    recipe = tiny_recipe(tmp_path, f"policy.precision={precision}", *RECOMPUTE[recompute])
    policy = policy_of(recipe)
    for name, row in ROWS.items():
        batch = batch_of(config, Layout(), *row)
        planned = planned_bytes(recipe, config, row_of(config, batch))
        assert planned == pytest.approx(kept_bytes(policy, batch), rel=TOLERANCE), name


def test_a_frozen_tower_keeps_nothing(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    recipe = tiny_recipe(tmp_path, "policy.precision=float32", f"{MEGATRON}freeze_vision=true")
    batch = batch_of(config, Layout(), *ROWS["one large image"])
    planned = planned_bytes(recipe, config, row_of(config, batch))
    assert planned == pytest.approx(kept_bytes(policy_of(recipe), batch), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("recompute", "precision"),
    [
        ("none", "float32"),
        ("full", "float32"),
        ("full", "bfloat16"),
        pytest.param("none", "bfloat16", marks=pytest.mark.full),
    ],
)
def test_the_peak_of_an_update_is_bounded_closely(tmp_path: Path, precision: str, recompute: str) -> None:
    """Kept activations and working memory are an upper bound of what forward and backward pass allocate.

    The working memory is a sum of worst moments, so the bound is not tight: at most a quarter above.
    """
    config, _ = make_tiny_qwen3vl(tmp_path, layers=6, hidden=128, heads=8, intermediate=256)
    recipe = tiny_recipe(tmp_path, f"policy.precision={precision}", *RECOMPUTE[recompute])
    policy = policy_of(recipe)
    for grids, samples in ((((), ()), 1), ((((8, 8),), ()), 1), ((((8, 8),), ()), 5)):
        batch = batch_of(config, Layout(), grids, 300, 200, samples)
        row = row_of(config, batch)
        policy.gradients([batch], toy_loss)  # whatever is allocated once
        peak = peak_bytes(lambda batch=batch: policy.gradients([batch], toy_loss))
        bound = planned_bytes(recipe, config, row) + update_working(recipe, config, Layout(), row, 0)
        assert peak <= bound <= 1.25 * peak
