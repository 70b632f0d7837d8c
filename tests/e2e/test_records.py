# SPDX-License-Identifier: Apache-2.0
"""Claims: a run records its rollouts, once each, at any layout; and a recorded step is taken again bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_g2rpo.models.qwen3_vl import Qwen3VLVision
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.records.reading import file_of, files_in, read_header, read_step
from megatron_g2rpo.rollout.transformers import features
from megatron_g2rpo.train import replay
from tests.e2e.runs import LAYOUTS_OF_TWO
from tests.e2e.toy import TASKS, Toy, call, error_of, metrics, succeed

ROLLOUTS = 24  # of a step of the toy's recipe
KEPT = {"save_period": 1, "keep_top_k": None, "export_hf": False}


def recipe_of(toy: Toy, tmp_path: Path, **changes: Any) -> Path:
    """Two steps with a checkpoint after each, and whatever else the toy's recipe has: dynamic sampling, a reference.

    Without the cache of image features: the tower learns, and a replay does not know the images of the second round of
    sampling.
    """
    loop = {"max_num_steps": 2, "val_at_start": False, "val_at_end": False, **changes}
    log = {"log_dir": str(tmp_path / "run")}
    uncached = {"vision_cache_mb": 0}
    return toy.recipe(tmp_path / "recipe.yaml", grpo=loop, logger=log, checkpointing=KEPT, policy=uncached)


@pytest.fixture(scope="module")
def recorded(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run, in this process."""
    root = tmp_path_factory.mktemp("recorded")
    result = call("train", recipe_of(toy, root))
    assert result.exit_code == 0, result.output
    return root


def test_a_run_records_every_rollout_and_what_it_was_trained_with(recorded: Path) -> None:
    lines = metrics(recorded / "run")
    assert list(files_in(recorded / "run")) == [1, 2]
    for step in (1, 2):
        table, header = read_step(recorded / "run", step)
        assert (header.is_whole, header.is_finished, header.rollouts) == (True, True, ROLLOUTS)
        assert header.run_id in (recorded / "run" / "identity.yaml").read_text()
        rows = table.to_pylist()
        assert [(row["group_id"], row["sample_index"]) for row in rows] == [(g, s) for g in range(6) for s in range(4)]
        assert {row["task"] for row in rows} == set(TASKS)
        assert sum(row["reward"] for row in rows) / ROLLOUTS == pytest.approx(lines[step]["train/reward"], rel=1e-9)
        assert {row["masked"] for row in rows} <= {None, "ratio"}, "which are trained on, or have weight 0"
        tokens = sum(len(row["response_ids"]) for row in rows)
        # Means of float32 over some hundred tokens, summed in another order.
        entropy = math.fsum(sum(row["entropies"]) for row in rows) / tokens
        assert entropy == pytest.approx(lines[step]["train/entropy"], rel=1e-5)
        gap = math.fsum(
            abs(old - behaviour)
            for row in rows
            for old, behaviour in zip(row["old_logprobs"], row["behaviour_logprobs"], strict=True)
        )
        # The gap is a difference of log-probabilities near 1, of which each has seven digits.
        assert gap / tokens == pytest.approx(lines[step]["train/rollout_gap_mean"], abs=1e-6)
        for row in rows:
            assert len(row["images"]) == len(row["image_widths"]) == {"colour": 1, "pair": 2, "sum": 0}[row["task"]]
            assert row["prompt_text"].count("<image>") == len(row["images"])
            assert row["question"] in row["prompt_text"].replace("<image>", "")
            # A length reward is a part of every task, `operands` is too: the recipe weighs them for all.
            assert all(row[f"reward_{part}"] is not None for part in ("accuracy", "format", "operands", "length"))
    assert lines[1]["time/record"] > 0.0


@pytest.mark.parametrize("step", [1, 2])
def test_a_recorded_step_is_taken_again_bit_for_bit(recorded: Path, step: int) -> None:
    before = {path: path.read_bytes() for path in (recorded / "run").rglob("*") if path.is_file()}
    result = call("train", recorded / "recipe.yaml", "--replay", recorded / "run", "--step", str(step))
    assert result.exit_code == 0, result.output
    assert re.search(rf"step {step}: all \d\d\d? metrics are equal to the record's", result.output), result.output
    assert {path: path.read_bytes() for path in before} == before, "a replay changes nothing of the run"


@pytest.mark.parametrize(
    ("graphs", "batch"),
    [
        pytest.param(2048, ROLLOUTS, id="an update reads passes with their graph"),
        pytest.param(0, ROLLOUTS // 2, id="a pass before two updates reads features"),
    ],
)
def test_what_generation_encoded_is_there_in_a_replay(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: int, batch: int
) -> None:
    """Bit for bit with the recipe's own caches, where a step's images are encoded in several passes.

    What is a matter of the last digits at most, those that an image is encoded with, is made one of the first here.
    """

    def in_company(self: Qwen3VLVision, tower: Any, pixels: Tensor, grids: Tensor) -> Tensor:
        return alone(self, tower, pixels, grids) + pixels.mean()

    alone = Qwen3VLVision.features
    monkeypatch.setattr(Qwen3VLVision, "features", in_company)
    monkeypatch.setattr(features, "PASS_PATCHES", 40)  # two images, of the five in a row
    recipe = toy.recipe(
        tmp_path / "recipe.yaml",
        grpo={"max_num_steps": 2, "val_at_start": False, "val_at_end": False, "dynamic_sampling": {"enabled": False}},
        loss_fn={"reference_policy_kl": {"penalty": 0.0}},
        policy={"vision_graph_mb": graphs, "train_global_batch_size": batch},
        logger={"log_dir": str(tmp_path / "run")},
        checkpointing=KEPT,
    )
    assert call("train", recipe).exit_code == 0
    saved = metrics(tmp_path / "run")[2]["work/vision_patches_saved"]
    assert saved > 0, "the policy read what generation had encoded"
    for step in ("1", "2"):
        result = call("train", recipe, "--replay", tmp_path / "run", "--step", step)
        assert re.search(rf"step {step}: all \d\d\d? metrics are equal", result.output), result.output
    monkeypatch.setattr(replay, "_encode_ahead", lambda *_: None)
    result = call("train", recipe, "--replay", tmp_path / "run", "--step", "2")
    assert re.search(r"^  train/rollout_gap_mean ", result.output, re.MULTILINE), result.output


def test_another_recipe_changes_the_metrics_that_it_is_about(recorded: Path) -> None:
    arguments = ("train", recorded / "recipe.yaml", "--replay", recorded / "run", "--step", "2")
    result = call(*arguments, "loss_fn.reference_policy_kl.penalty=5.0", "env.reward_weights.format=0.3")
    assert result.exit_code == 0, result.output
    assert "changed: loss_fn.reference_policy_kl.penalty: 0.05 in the run, 5.0 here" in result.output
    changed = re.findall(r"^  (train/\S+) ", result.output, re.MULTILINE)
    assert {"train/loss", "train/grad_norm", "train/reward"} <= set(changed)
    assert not {"train/accuracy", "train/entropy", "train/response_tokens"} & set(changed)


def test_what_cannot_be_replayed_says_why_and_what_can(recorded: Path, tmp_path: Path) -> None:
    recipe, run = recorded / "recipe.yaml", recorded / "run"
    assert "has no record of step 7; recorded are 1-2" in error_of("train", recipe, "--replay", run, "--step", "7")
    sampled = error_of("train", recipe, "--replay", run, "--step", "2", "policy.generation.temperature=0.5")
    assert "policy.generation.temperature: 1.0 in the run, 0.5 here" in sampled
    part = ("env.reward_weights.structure=0.1", "env.reward_weights.accuracy=0.8")
    assert "weighs structure, and step 2 was recorded with the parts accuracy, format, length, operands" in error_of(
        "train", recipe, "--replay", run, "--step", "2", *part
    )
    (run / "checkpoints" / "step_1").rename(tmp_path / "step_1")
    try:
        missing = error_of("train", recipe, "--replay", run, "--step", "2")
    finally:
        (tmp_path / "step_1").rename(run / "checkpoints" / "step_1")
    assert "step 2 starts from the checkpoint of step 1, and the run has those of 2" in missing
    assert missing.endswith("step 1 can be")


def test_a_step_that_the_budget_cut_cannot_be_replayed(toy: Toy, recorded: Path, tmp_path: Path) -> None:
    recipe = recipe_of(toy, tmp_path, max_num_steps=1)
    budget = 0.8 * file_of(recorded / "run", 1).stat().st_size / 1e6
    assert call("train", recipe, f"logger.rollouts.budget_mb={budget}").exit_code == 0
    header = read_header(file_of(tmp_path / "run", 1))
    assert not header.is_whole
    error = error_of("train", recipe, "--replay", tmp_path / "run", "--step", "1")
    assert f"of the step's {ROLLOUTS} rollouts" in error
    assert error.endswith("only whole steps can be replayed; none of this run can be")


def test_a_step_that_fails_has_left_its_record_and_fails_again_in_its_replay(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = recipe_of(toy, tmp_path), tmp_path / "run"
    original, broken = MegatronPolicy.gradient_norm, [2]

    def gradient_norm(self: MegatronPolicy, *arguments: Any, **options: Any) -> dict[str, float]:
        found = original(self, *arguments, **options)
        broken[0] -= 1
        return {**found, "grad_norm": math.nan} if broken[0] <= 0 else found

    monkeypatch.setattr(MegatronPolicy, "gradient_norm", gradient_norm)
    settings = ("grpo.task_gradient_period=0", "policy.megatron_cfg.optimizer.max_skipped_updates=0")
    failed = call("train", recipe, *settings)
    assert failed.exit_code == 1
    assert "step 2: the gradient's norm is nan" in failed.stderr
    table, header = read_step(run, 2)
    assert (header.is_whole, header.is_finished, table.num_rows) == (True, False, ROLLOUTS)
    replay = ("train", recipe, "--replay", run, "--step", "2", *settings)
    again = error_of(*replay)
    assert "step 2: the gradient's norm is nan" in again
    assert str(run / "replays" / "skipped") in again
    # Without what broke it, it says what the step would have given.
    monkeypatch.setattr(MegatronPolicy, "gradient_norm", original)
    mended = call(*replay)
    assert mended.exit_code == 0, mended.output
    assert "the run has no metrics of step 2, which did not end there; here it gives:" in mended.output
    # Before the run goes on, and takes the step again: its record is then a finished one.
    assert call("train", recipe, *settings).exit_code == 0
    assert read_header(file_of(run, 2)).is_finished
    rows = read_step(run, 2)[0]
    assert rows.column("response_ids").equals(table.column("response_ids"))


@pytest.mark.full
@pytest.mark.parametrize("layout", ["dp2", "tp2-sp"])
def test_two_ranks_record_one_table_and_replay_it_bit_for_bit(toy: Toy, tmp_path: Path, layout: str) -> None:
    recipe, run = recipe_of(toy, tmp_path), tmp_path / "run"
    arguments = ("train", recipe, *LAYOUTS_OF_TWO[layout])
    succeed(*arguments, nproc=2)
    for step in (1, 2):
        table, header = read_step(run, step)
        assert table.num_rows == header.rollouts == ROLLOUTS
        assert header.data_ranks == (2 if layout == "dp2" else 1)
        places = list(zip(*(table.column(name).to_pylist() for name in ("group_id", "sample_index")), strict=True))
        assert places == [(group, sample) for group in range(6) for sample in range(4)]
        assert len(set(table.column("data_rank").to_pylist())) == header.data_ranks
    output = succeed(*arguments, "--replay", run, "--step", "2", nproc=2)
    assert re.search(r"step 2: all \d\d\d? metrics are equal to the record's", output), output
