# SPDX-License-Identifier: Apache-2.0
"""Recipes for the tests of this folder: the exemplar, with a run directory of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import TrainRecipe
from tests.common.recipes import G2RPO


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run directory, which does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def make_recipe(run: Path) -> Callable[..., TrainRecipe]:
    """A G2RPO recipe with overrides."""

    def make(*overrides: str) -> TrainRecipe:
        return recipes.load(G2RPO, [f"logger.log_dir={run}", "logger.report_enabled=false", *overrides], "train")

    return make
