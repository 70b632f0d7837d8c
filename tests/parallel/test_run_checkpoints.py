# SPDX-License-Identifier: Apache-2.0
"""Claim: ranks agree on what is saved, kept and refused, whichever of them sees why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.launch import torchrun_json
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.mark.full
def test_two_ranks_save_resume_and_refuse_together(tmp_path: Path) -> None:
    make_tiny_qwen3vl(tmp_path / "model", layers=1, vision_depth=2, deepstack=(0,))
    one, two = torchrun_json(2, "tests.parallel.run_checkpoints_worker", str(tmp_path))
    assert one == two
    assert one["async"] == ["step_1", "step_3"]
    assert one["found"] == [3, {"val/mean_reward": 0.2}, {"step": 3, "position": 3}]
    assert one["later"] == one["after full"] == one["after nan"] == ["step_1", "step_4"]
    assert one["full"].startswith(f"rank 1 could not write {tmp_path}/run/step_5.partial: No space left on device (")
    assert "after step 6" in one["nan"]
    assert "decoder.layers.0.self_attention.linear_proj.weight" in one["nan"]
    assert one["ended"] == [["step_1"], ["step_1", "step_2.partial"]], "an error of one rank alone waits for no other"
