# SPDX-License-Identifier: Apache-2.0
"""Claims: on a GPU, on local layers in float32, a run is the run of the CPU: its metrics, its resume, its layouts.

Both start from one policy and sample with the same named random numbers; collectives of two ranks are NCCL's. What
differs on a real GPU is the order of sums, so steps agree to digits; on the virtual one the kernels are the CPU's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_g2rpo.policy.device import select
from tests.e2e.conftest import WarmStart, warm_start
from tests.e2e.runs import DISTRIBUTED, FIVE_DIGITS, LAYOUTS_OF_TWO, assert_same_step, checkpoints
from tests.e2e.toy import LOCAL, Toy, call, metrics, numbers, succeed

pytestmark = pytest.mark.without_transformer_engine

# Adam's first step divides a gradient by its own size: where that is nothing but rounding, so is the step.
AFTER_AN_UPDATE = 1e-3


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> WarmStart:
    return warm_start(tmp_path_factory.mktemp("warm"), "gpu")


@pytest.fixture(scope="module")
def toy(warm: WarmStart) -> Toy:
    return warm.trained


@pytest.fixture(scope="module")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go on the GPU; the run directory."""
    root = tmp_path_factory.mktemp("straight")
    succeed("train", toy.recipe(root / "recipe.yaml"), f"logger.log_dir={root / 'run'}")
    return root / "run"


def half(toy: Toy, root: Path) -> Path:
    """Two steps, with a checkpoint, validation and an export; the run directory."""
    succeed("train", toy.recipe(root / "recipe.yaml"), "grpo.max_num_steps=2", f"logger.log_dir={root / 'run'}")
    return root / "run"


@pytest.fixture(scope="module")
def halfway(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(toy, tmp_path_factory.mktemp("gpu"))


def test_the_device_is_a_gpu_with_nccl() -> None:
    device = select()
    assert (device.kind, device.torch_device.type, device.nccl) == ("gpu", "cuda", True)


def test_supervised_training_learns_as_on_the_cpu(warm: WarmStart, tmp_path: Path) -> None:
    lines = metrics(warm.run)
    assert lines[1]["train/loss"] > 5.0  # ln(vocabulary) = 5.7 nats
    assert lines[40]["train/loss"] < 0.5
    assert lines[40]["val/mean_greedy_format"] > 0.9
    recipe = replace(warm.toy, device="cpu").recipe(
        tmp_path / "sft.yaml", "sft", logger={"log_dir": str(tmp_path / "run")}
    )
    succeed("sft", recipe, "sft.max_num_steps=10", "sft.val_at_end=false", "checkpointing.enabled=false")
    expected = metrics(tmp_path / "run")
    for step, tolerance in ((1, FIVE_DIGITS), (10, AFTER_AN_UPDATE)):
        for name in ("train/loss", "train/grad_norm"):
            assert lines[step][name] == pytest.approx(expected[step][name], rel=tolerance), (step, name)


def test_a_run_is_that_of_the_cpu(toy: Toy, halfway: Path, tmp_path: Path) -> None:
    on_cpu = half(replace(toy, device="cpu"), tmp_path)
    lines, expected = metrics(halfway), metrics(on_cpu)
    assert list(lines) == list(expected) == [0, 1, 2]
    assert lines[1]["train/zero_variance_groups"] < 1.0, "the comparisons of this file need advantages"
    for step in (1, 2):
        assert set(lines[step]) == set(expected[step])
        assert_same_step(lines[step], expected[step], FIVE_DIGITS if step == 1 else AFTER_AN_UPDATE)
        # The engine computes what the trainer computes: fp32 noise over a few layers.
        assert lines[step]["train/rollout_gap_max"] < 1e-4
        assert lines[step]["train/ratio"] == 1.0
    # Greedy answers and answers drawn with named numbers.
    for name in ("val/mean_reward", "val/mean_greedy_reward"):
        assert lines[0][name] == pytest.approx(expected[0][name], rel=FIVE_DIGITS)
    start, ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (toy.model, halfway / "hf", on_cpu / "hf")
    )
    assert ours.keys() == theirs.keys() == start.keys()
    moved = sum(float((theirs[name] - start[name]).square().sum()) for name in start)
    apart = sum(float((theirs[name] - ours[name]).square().sum()) for name in start)
    # Weights whose gradient is nothing but rounding go either way: a hundredth of what two updates did.
    assert moved > 0.0
    assert apart < 1e-4 * moved


def test_a_resumed_run_is_the_straight_run_bit_for_bit(toy: Toy, halfway: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    succeed("train", toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)}))
    assert checkpoints(run) == ["step_4"]
    expected, resumed = metrics(straight), metrics(run)
    for step in (0, 1, 3, 4):  # 2 has the validation of a last step
        assert numbers(resumed[step]) == numbers(expected[step]), step
    assert (run / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


@pytest.mark.devices(2)
def test_two_ranks_over_nccl_give_the_numbers_of_one(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """Tensor and sequence parallel; its checkpoint continued by data parallelism with everything distributed."""
    expected, run = metrics(straight), tmp_path / "run"
    recipe = toy.recipe(
        tmp_path / "recipe.yaml", grpo={"val_at_start": False, "val_at_end": False}, logger={"log_dir": str(run)}
    )
    succeed("train", recipe, "grpo.max_num_steps=1", *LAYOUTS_OF_TWO["tp2-sp"], nproc=2)
    assert_same_step(metrics(run)[1], expected[1], FIVE_DIGITS)
    succeed("train", recipe, "grpo.max_num_steps=2", *DISTRIBUTED, nproc=2)
    assert_same_step(metrics(run)[2], expected[2], AFTER_AN_UPDATE)


def test_the_commands_beside_the_loop_run_there(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    shown = call("train", recipe, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "device: gpu" in shown.stdout
    planned = call("plan", recipe)
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "run").exists(), "neither starts anything"

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "response": "2"}\n')
    tables = []
    for device in ("gpu", "cpu"):
        target = tmp_path / f"{device}.jsonl"
        arguments = ("logprobs", "--model", toy.model, "--input", source, "--output", target)
        succeed(*arguments, f"cluster.device={device}", *LOCAL)
        tables.append(json.loads(target.read_text()))
    ours, theirs = tables
    assert ours["token_ids"] == theirs["token_ids"]
    for name in ("logprobs", "entropies"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)  # fp32, summed in another order
