# SPDX-License-Identifier: Apache-2.0
"""Claims: supervised training through the command line learns, resumes, and refuses a sample without a response."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.conftest import WarmStart
from tests.e2e.runs import checkpoints
from tests.e2e.toy import Toy, call, error_of, metrics, write_shards


def test_supervised_training_learns_and_resumes(warm: WarmStart, tmp_path: Path) -> None:
    first = metrics(warm.run)
    assert list(first) == [1, 10, 20, 30, 40]
    # Untrained, the loss is ln(vocabulary) = 5.7 nats; the format alone is most of a response.
    assert first[1]["train/loss"] > 5.0
    assert first[40]["train/loss"] < 0.5
    assert first[40]["val/mean_greedy_format"] > 0.9

    run = tmp_path / "run"
    shutil.copytree(warm.run, run)
    result = call("sft", warm.recipe, f"logger.log_dir={run}", "sft.max_num_steps=42")
    assert result.exit_code == 0, result.output
    resumed = metrics(run)
    assert list(resumed) == [1, 10, 20, 30, 40, 42]
    assert resumed[40] == first[40]
    # From the saved weights and moments: a loss like the last one, not like the first.
    assert resumed[42]["train/loss"] < 0.5
    assert checkpoints(run) == ["step_42"]


def test_a_sample_without_a_response_is_named(warm: WarmStart, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 2, response=None)
    write_shards(tmp_path / "val", 1)
    recipe = Toy(tmp_path, warm.toy.model).recipe(
        tmp_path / "sft.yaml", "sft", logger={"log_dir": str(tmp_path / "run")}, sft={"val_at_end": False}
    )
    message = error_of("sft", recipe)
    assert message.startswith("sample shard-000000/")
    assert "has no response" in message


def test_a_response_that_cannot_be_trained_on_is_named(warm: WarmStart, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 2, response="long " * 200)
    write_shards(tmp_path / "val", 1)
    recipe = Toy(tmp_path, warm.toy.model).recipe(
        tmp_path / "sft.yaml", "sft", logger={"log_dir": str(tmp_path / "run")}
    )
    message = error_of("sft", recipe)
    assert message.startswith("sample shard-000000/")
    assert "policy.max_total_sequence_length (128)" in message
