# SPDX-License-Identifier: Apache-2.0
"""Claim: recomputed activations, deepstack features among them, give the loss and gradients of kept ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import LayoutError
from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.common.compare import relative_distance
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

# The same operations on the same numbers; only sums over micro-batches could be taken in another order.
TOLERANCE = 1e-6

MODES: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full"},
    "uniform-3": {"recompute_granularity": "full", "recompute_num_layers": 3},
    "block": {"recompute_granularity": "full", "recompute_method": "block"},
    "block-all": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 9},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory)  # three layers, two of them with deepstack features
    return directory


def losses_and_gradients(directory: Path, **megatron: Any) -> tuple[float, dict[str, Tensor]]:
    policy = MegatronPolicy(layout_options(directory, **megatron), select("cpu"), seed=0, max_steps=10)
    batches = packer_for(policy.hf_config).pack(random_sequences(policy.hf_config), budget=80)
    assert any(len(batch.image_grid_thw) for batch in batches)
    loss = policy.gradients(batches, toy_loss)["loss"]
    return loss, {name: value.clone() for name, value in policy.stream(lambda parameter: parameter.main_grad)}


@pytest.fixture(scope="module")
def kept(directory: Path) -> tuple[float, dict[str, Tensor]]:
    return losses_and_gradients(directory)


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_changes_nothing(directory: Path, kept: tuple[float, dict[str, Tensor]], mode: str) -> None:
    loss, gradients = losses_and_gradients(directory, **MODES[mode])
    assert loss == pytest.approx(kept[0], rel=TOLERANCE)
    assert gradients.keys() == kept[1].keys()
    for name, expected in kept[1].items():
        error = relative_distance(gradients[name], expected)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def test_a_chunk_that_does_not_divide_a_stage_is_refused(directory: Path) -> None:
    with pytest.raises(LayoutError, match="recompute_num_layers=2 does not divide the 3 layers"):
        losses_and_gradients(directory, recompute_granularity="full", recompute_num_layers=2)


@pytest.mark.parametrize(("granularity", "runs"), [(None, 1), ("selective", 1), ("full", 2)])
def test_full_recomputation_takes_in_the_vision_tower(directory: Path, granularity: str | None, runs: int) -> None:
    options = layout_options(directory, recompute_granularity=granularity)
    policy = MegatronPolicy(options, select("cpu"), seed=0, max_steps=10)
    batches = packer_for(policy.hf_config).pack(random_sequences(policy.hf_config), budget=80)
    rows = sum(len(batch.image_grid_thw) > 0 for batch in batches)
    calls = []
    assert policy.model.vision_model is not None
    policy.model.vision_model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore
    policy.gradients(batches, toy_loss)
    assert len(calls) == runs * rows
    calls.clear()
    policy.logprobs(batches)  # nothing to recompute for
    assert len(calls) == rows
    calls.clear()
    policy.gradients(batches, toy_loss)  # transformers recomputes in training mode only: it must be back on
    assert len(calls) == runs * rows
