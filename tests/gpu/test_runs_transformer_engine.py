# SPDX-License-Identifier: Apache-2.0
"""Claims: on Transformer Engine's layers in bfloat16, training learns, resumes and changes its layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import WarmStart, warm_start
from tests.e2e.runs import DISTRIBUTED, LAYOUTS_OF_TWO, assert_same_step, checkpoints
from tests.e2e.toy import Toy, metrics, numbers, succeed
from tests.gpu.devices import needs_transformer_engine

pytestmark = needs_transformer_engine

ENGINE = (
    "policy.precision=bfloat16",
    "policy.megatron_cfg.transformer_impl=transformer_engine",
    "policy.megatron_cfg.core_attention=transformer_engine",
)
# Nats. The policy that samples is the trainer's, rounded to bfloat16 as its layers are: 8 bits over a few layers.
GAP = 0.02


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> WarmStart:
    return warm_start(tmp_path_factory.mktemp("warm"), "gpu", *ENGINE)


@pytest.fixture(scope="module")
def toy(warm: WarmStart) -> Toy:
    return warm.trained


@pytest.fixture(scope="module")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go; the run directory."""
    root = tmp_path_factory.mktemp("straight")
    succeed("train", toy.recipe(root / "recipe.yaml"), *ENGINE, f"logger.log_dir={root / 'run'}")
    return root / "run"


def test_supervised_training_learns(warm: WarmStart) -> None:
    lines = metrics(warm.run)
    assert lines[1]["train/loss"] > 5.0  # ln(vocabulary) = 5.7 nats
    assert lines[40]["train/loss"] < 0.5
    assert lines[40]["val/mean_greedy_format"] > 0.9


def test_a_run_trains(straight: Path) -> None:
    lines = metrics(straight)
    assert list(lines) == [0, 1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert lines[step]["train/rollout_gap_mean"] < GAP
        # The same weights and rows in the log-probability pass and in the update: the same bits.
        assert lines[step]["train/ratio"] == 1.0
        assert lines[step]["train/grad_norm"] > 0.0
    assert lines[4]["train/reference_kl"] > lines[1]["train/reference_kl"]
    assert (straight / "hf" / "model.safetensors").exists()


def test_a_resumed_run_is_the_straight_run_bit_for_bit(toy: Toy, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    succeed("train", recipe, *ENGINE, "grpo.max_num_steps=2")
    succeed("train", recipe, *ENGINE)
    assert checkpoints(run) == ["step_4"]
    expected, resumed = metrics(straight), metrics(run)
    for step in (0, 1, 3, 4):  # 2 has the validation of a last step
        assert numbers(resumed[step]) == numbers(expected[step]), step
    assert (run / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


@pytest.mark.devices(2)
def test_two_ranks_give_the_numbers_of_one(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """Tensor and sequence parallel; its checkpoint continued by data parallelism with everything distributed."""
    expected, run = metrics(straight), tmp_path / "run"
    recipe = toy.recipe(
        tmp_path / "recipe.yaml", grpo={"val_at_start": False, "val_at_end": False}, logger={"log_dir": str(run)}
    )
    # bfloat16, in other sums: the samples are the same, since the engine's weights are, the rest is to two digits.
    succeed("train", recipe, *ENGINE, "grpo.max_num_steps=1", *LAYOUTS_OF_TWO["tp2-sp"], nproc=2)
    assert_same_step(metrics(run)[1], expected[1], 2e-2)
    succeed("train", recipe, *ENGINE, "grpo.max_num_steps=2", *DISTRIBUTED, nproc=2)
    # The second step has samples of its own: bfloat16 moves some. What the first update did is there again.
    assert list(metrics(run)) == [1, 2]
    distance, reference = metrics(run)[2]["train/reference_kl"], expected[2]["train/reference_kl"]
    assert reference / 3 < distance < 3 * reference
    assert metrics(run)[2]["train/rollout_gap_mean"] < GAP
