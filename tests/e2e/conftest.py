# SPDX-License-Identifier: Apache-2.0
"""The data, and a policy warm-started by the command line, once for all end-to-end tests."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.common.leftovers import no_process_is_left
from tests.common.once import built_once
from tests.e2e.toy import DEVICE, Toy, build_policy, succeed, write_shards

__all__ = ["no_process_is_left"]


@dataclass(frozen=True)
class WarmStart:
    """A finished supervised run.

    Attributes:
        toy: its data, and the untrained policy that it started from.
        recipe: its recipe.
        run: its directory.
        trained: the data with a copy of the policy that it exported.
    """

    toy: Toy
    recipe: Path
    run: Path
    trained: Toy


def warm_start(root: Path, device: str = DEVICE, *overrides: str) -> WarmStart:
    """40 steps of `megatron-g2rpo sft`: enough for the format and for a reward that varies.

    Args:
        root: folder for the data, the policies and the run.
        device: ``cluster.device``.
        overrides: further keys of the recipe.
    """
    write_shards(root / "data" / "train", 16)
    write_shards(root / "data" / "val", 12, first=16)
    warm = _at(root, device)
    build_policy(warm.toy.data, warm.toy.model)
    warm.toy.recipe(warm.recipe, "sft", logger={"log_dir": str(warm.run)})
    succeed("sft", warm.recipe, *overrides)
    shutil.copytree(warm.run / "hf", warm.trained.model)
    return warm


def _at(root: Path, device: str) -> WarmStart:
    data = root / "data"
    return WarmStart(
        Toy(data, root / "init", device), root / "sft.yaml", root / "run", Toy(data, root / "policy", device)
    )


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> WarmStart:
    """The supervised run that all of them start from. Others may read it meanwhile: continue a copy."""
    return _at(built_once(tmp_path_factory, "warm", warm_start), DEVICE)


@pytest.fixture(scope="session")
def toy(warm: WarmStart) -> Toy:
    """The data and the warm-started policy."""
    return warm.trained


@pytest.fixture(scope="session")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go, rewards from other processes; the run directory. Others may read it: continue a copy."""

    def build(root: Path) -> None:
        recipe = toy.recipe(root / "recipe.yaml", env={"reward_workers": 2})
        succeed("train", recipe, f"logger.log_dir={root / 'run'}")

    return built_once(tmp_path_factory, "straight", build) / "run"
