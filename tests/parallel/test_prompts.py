# SPDX-License-Identifier: Apache-2.0
"""Claim: prompts that the ranks of a replica decode in shares and exchange are, bit for bit, those that one decodes.

Bad samples are counted once, and an error on one rank is an error on all.
"""

from __future__ import annotations

from pathlib import Path

from tests.common.launch import torchrun_json
from tests.unit.data.conftest import break_image, load_example, write_dataset


def test_prompts_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data" / "train")
    load_example("build_policy").build(tmp_path / "data", tmp_path / "model")
    break_image(dataset, "ocr", 4)
    results = torchrun_json(2, "tests.parallel.prompts_worker", str(dataset), str(tmp_path / "model"))
    assert results[0]["alone"]["image"] > 0
    for result in results:
        assert result["equal"] == [True] * 5
        total = float(result["alone"]["image"])
        assert result["metrics"] == {"train/skipped_samples": total, "train/skipped/image": total}
        assert "sample 'ocr-4'" in result["raised"]
