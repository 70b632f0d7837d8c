# SPDX-License-Identifier: Apache-2.0
"""Claims: updates that are not finite, or spikes, are skipped and recorded, a resumed run decides alike, and too many
in a row end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.train.step.bad_updates import UpdateGuard
from tests.common.recipes import G2RPO

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def group() -> dist.ProcessGroup:
    init_process_group(select("cpu"))
    world = dist.group.WORLD
    assert world is not None
    return world


def guard_of(tmp_path: Path, **changes: Any) -> UpdateGuard:
    keys = [f"policy.megatron_cfg.optimizer.{key}={value}" for key, value in changes.items()]
    options = recipes.load(G2RPO, keys, "train").policy.megatron_cfg.optimizer
    return UpdateGuard(options, tmp_path / "skipped")


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (1.0, INF), (-INF, 1.0)])
def test_what_is_not_finite_is_skipped(tmp_path: Path, loss: float, norm: float) -> None:
    guard = guard_of(tmp_path)
    assert guard.skips(loss, norm)
    assert not guard.skips(1.0, 1e30), "without a factor no finite norm is a spike"


def test_a_spike_is_a_multiple_of_the_median_of_norms_that_were_taken(tmp_path: Path) -> None:
    guard = guard_of(tmp_path, grad_norm_spike_factor=10.0, grad_norm_spike_window=3)
    assert not guard.skips(0.0, 1.0)
    assert not guard.skips(0.0, 500.0), "the window is not full"
    assert not guard.skips(0.0, 2.0)
    assert not guard.skips(0.0, 19.9), "the median of 1, 500 and 2 is 2"
    assert guard.skips(0.0, 200.1), "the median of 500, 2 and 19.9 is 19.9"
    assert not guard.skips(0.0, 198.9), "a norm that was skipped is not among them"


def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Path) -> None:
    options = {"grad_norm_spike_factor": 2.0, "grad_norm_spike_window": 4, "max_skipped_updates": 1}
    norms = [1.0, 1.2, 0.9, 1.1, 2.3, 1.0, 2.2, 2.2, 1.9]
    whole = guard_of(tmp_path, **options)
    expected = [whole.skips(0.0, norm) for norm in norms]
    assert True in expected
    for cut in range(len(norms)):
        first, second = guard_of(tmp_path, **options), guard_of(tmp_path, **options)
        before = [first.skips(0.0, norm) for norm in norms[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + [second.skips(0.0, norm) for norm in norms[cut:]] == expected
        assert second.state_dict() == whole.state_dict()


def test_the_batch_is_recorded_and_one_too_many_in_a_row_ends_the_run(tmp_path: Path, group: dist.ProcessGroup) -> None:
    guard, notes = guard_of(tmp_path, max_skipped_updates=2), []

    def settle(step: int, number: int = 0) -> None:
        samples = [{"key": "shard/7", "response_ids": [1, 2], "reward": NAN}]
        guard.settle(step, number, lambda: samples, group=group, note=notes.append)

    assert guard.skips(0.5, INF)
    settle(3)
    record = json.loads((tmp_path / "skipped" / "step_3.update_0.json").read_text(), parse_constant=pytest.fail)
    assert (record["step"], record["update"], record["loss"], record["grad_norm"]) == (3, 0, 0.5, "inf")
    assert record["samples"] == [{"key": "shard/7", "response_ids": [1, 2], "reward": "nan"}]
    assert len(notes) == 1
    assert "the gradient's norm is inf at loss 0.5; the update is skipped" in notes[0]
    assert not guard.skips(0.5, 1.0)
    settle(4)
    assert len(notes) == 1, "nothing is said of an update that was taken"
    for number in range(2):
        assert guard.skips(NAN, NAN)
        settle(5, number)
    assert guard.skips(NAN, NAN)
    with pytest.raises(FloatingPointError, match=r"step 6: .* no optimizer step was taken; 2 before it were skipped"):
        settle(6)
    assert (tmp_path / "skipped" / "step_6.update_0.json").exists()


def test_with_zero_the_first_ends_the_run(tmp_path: Path, group: dist.ProcessGroup) -> None:
    guard = guard_of(tmp_path, max_skipped_updates=0)
    assert guard.skips(1.0, NAN)
    with pytest.raises(FloatingPointError, match="no optimizer step was taken; the batch is in"):
        guard.settle(1, 0, list, group=group, note=print)
