# SPDX-License-Identifier: Apache-2.0
"""Claim: an update that is not finite, or a spike, is skipped, counted and recorded, and the run goes on, or ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.e2e.toy import Toy, call, metrics, numbers

OPTIMIZER = "policy.megatron_cfg.optimizer"


def recipe_of(toy: Toy, tmp_path: Path, run: str = "run") -> Path:
    loop = {"max_num_steps": 3, "val_at_start": False, "val_at_end": False, "task_gradient_period": 0}
    recipe = {
        "grpo": {**loop, "dynamic_sampling": {"enabled": False}},
        "logger": {"log_dir": str(tmp_path / run)},
        "checkpointing": {"export_hf": False},
    }
    return toy.recipe(tmp_path / f"{run}.yaml", **recipe)


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Let the gradients of some updates, counted from 1, have the norm and the loss that an overflow gives."""
    original, count = MegatronPolicy.gradient_norm, [0]

    def gradient_norm(self: MegatronPolicy, *arguments: Any) -> dict[str, float]:
        count[0] += 1
        found = original(self, *arguments)
        return {**found, "grad_norm": math.nan, "loss": math.inf} if count[0] in calls else found

    monkeypatch.setattr(MegatronPolicy, "gradient_norm", gradient_norm)


def test_a_step_that_is_not_finite_is_skipped_counted_and_recorded(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2})
    result = call("train", recipe_of(toy, tmp_path))
    assert result.exit_code == 0, result.output
    lines = metrics(tmp_path / "run")
    assert [lines[step]["train/skipped_updates"] for step in (1, 2, 3)] == [0.0, 1.0, 0.0]
    assert "train/grad_norm" not in lines[2]
    assert math.isfinite(lines[3]["train/grad_norm"])
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    record = json.loads((tmp_path / "run" / "skipped" / "step_2.update_0.json").read_text())
    assert (record["grad_norm"], record["loss"]) == ("nan", "inf")
    assert len(record["samples"]) == 24
    assert {sample["task"] for sample in record["samples"]} == {"colour", "pair", "sum"}
    assert all(sample["response_ids"] and sample["key"] for sample in record["samples"])
    rewards = [sample["reward"] for sample in record["samples"]]
    assert math.isclose(sum(rewards) / 24, lines[2]["train/reward"], rel_tol=1e-9)
    assert "warning: step 2: the gradient's norm is nan at loss inf; the update is skipped" in result.output


def test_one_too_many_in_a_row_ends_the_run(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 3})
    result = call("train", recipe_of(toy, tmp_path), f"{OPTIMIZER}.max_skipped_updates=1")
    assert result.exit_code == 1
    assert "step 3: the gradient's norm is nan at loss inf; no optimizer step was taken; 1 before it" in result.stderr
    assert sorted(metrics(tmp_path / "run")) == [1, 2]


@pytest.mark.full
def test_a_run_that_skips_spikes_resumes_exactly(toy: Toy, tmp_path: Path) -> None:
    """Every norm above its predecessor is a spike here, so that what a checkpoint forgot would change the next step."""
    spikes = (f"{OPTIMIZER}.grad_norm_spike_factor=1.0001", f"{OPTIMIZER}.grad_norm_spike_window=1")
    settings = (*spikes, f"{OPTIMIZER}.max_skipped_updates=9")
    whole, parts = recipe_of(toy, tmp_path, "whole"), recipe_of(toy, tmp_path, "parts")
    assert call("train", whole, *settings, "grpo.max_num_steps=6").exit_code == 0
    for steps in (2, 4, 6):
        assert call("train", parts, *settings, f"grpo.max_num_steps={steps}").exit_code == 0
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert {step: numbers(line) for step, line in found.items()} == {
        step: numbers(line) for step, line in expected.items()
    }
    assert 0 < sum(line["train/skipped_updates"] for line in expected.values()) < 6
