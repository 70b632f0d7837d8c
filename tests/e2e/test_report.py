# SPDX-License-Identifier: Apache-2.0
"""Claim: ``train`` leaves a page with its steps and its samples, and says where; ``report`` writes the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.e2e.toy import Toy, succeed


def block(page: Path, name: str) -> dict:
    found = re.search(
        rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert found is not None, name
    return json.loads(found[1])


def test_training_leaves_a_page(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"report_enabled": True, "log_dir": str(tmp_path / "run")})
    said = succeed("train", recipe)
    page = tmp_path / "run" / "report" / "report.html"
    assert f"report: {page}" in said.replace("\n", "")
    held, samples = block(page, "page"), block(page, "samples-0")
    assert held["last_step"] == 4
    assert samples["shown"] == samples["recorded"] > 0
    assert samples["vocabulary"]
    page.unlink()
    assert f"wrote {page}" in succeed("report", tmp_path / "run")
    assert block(page, "samples-0") == samples
