# SPDX-License-Identifier: Apache-2.0
"""Claim: a recipe's ``env_vars`` are set in every training process, before anything could have read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run

from megatron_g2rpo.cli import running
from megatron_g2rpo.policy.device import DeviceError
from megatron_g2rpo.policy.environment import check_environment, set_environment
from megatron_g2rpo.recipe import EXEMPLARS, Recipe, load

ROOT = Path(__file__).parents[3]
NAME = "NVTE_MEGATRON_G2RPO_TEST"
OVERRIDES = ["env.tasks.mine={}", f"policy.megatron_cfg.env_vars={{{NAME}: set}}"]

# A rank of `train`, as torchrun starts it, up to the import of the training loop. What it prints is what Transformer
# Engine and torch would see, and whether they are there to see it.
RANK = """
import os, sys
from megatron_g2rpo.cli import loops
from megatron_g2rpo.policy import environment
real = environment.set_environment
def set_environment(env_vars):
    loaded = [name for name in ("megatron.core", "transformer_engine") if name in sys.modules]
    import torch
    print("loaded before:", loaded, "device asked:", torch.cuda.is_initialized())
    real(env_vars)
environment.set_environment = set_environment
loops.with_local_model = lambda recipe: recipe
loops._entry = lambda kind: lambda recipe, **_: print("sees:", os.environ.get(sys.argv[1]))
options = {"dry_run": False, "fresh": False, "quiet": False}
loops._loop("train", __import__("pathlib").Path(sys.argv[2]), sys.argv[3:], None, **options)
"""


def recipe(*overrides: str) -> Recipe:
    return load(EXEMPLARS / "vlm_g2rpo.yaml", [*OVERRIDES, *overrides], "train")


def test_a_rank_sets_them_before_it_loads_megatron_or_asks_for_a_device() -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MEGATRON_G2RPO_LAUNCHED": "1"}
    command = [sys.executable, "-c", RANK, NAME, str(EXEMPLARS / "vlm_g2rpo.yaml"), *OVERRIDES]
    environment = {**os.environ, **ranks, NAME: "inherited"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("loaded", "sees"))]
    assert lines == ["loaded before: [] device asked: False", "sees: set"]


def test_processes_that_are_launched_inherit_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_g2rpo.commands.launch import launch

    seen: list[str | None] = []
    monkeypatch.setattr(torch.distributed.run, "main", lambda arguments: seen.append(os.environ.get(NAME)))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(NAME, "inherited")
    assert running.prepare_processes(recipe("cluster.gpus_per_node=2", "cluster.num_nodes=1"))
    launch(2, ["train", "recipe.yaml"])
    assert seen == ["set"]


def test_one_process_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(NAME, "inherited")
    assert not running.prepare_processes(recipe("cluster.gpus_per_node=1", "cluster.num_nodes=1"))
    assert os.environ[NAME] == "set"


def test_a_policy_without_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of one's own that builds a policy: the settings would be without effect, silently."""
    monkeypatch.setenv(NAME, "other")
    with pytest.raises(DeviceError, match=NAME):
        check_environment({NAME: "set", "PATH": os.environ["PATH"]})
    set_environment({NAME: "set"})
    check_environment({NAME: "set"})
