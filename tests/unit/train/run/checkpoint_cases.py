# SPDX-License-Identifier: Apache-2.0
"""What the tests of checkpoints share: a tiny policy, a step of it, and its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.run.logs import MetricsLog
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.run.stopping import Stopping
from megatron_g2rpo.train.step.bad_updates import UpdateGuard
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.recipes import G2RPO
from tests.common.tiny_model import make_tiny_qwen3vl


def make_model(directory: Path) -> Path:
    make_tiny_qwen3vl(directory, layers=1, vision_depth=2, deepstack=(0,))
    return directory


def make_policy(model_dir: Path, precision: str = "float32", freeze_vision: bool = False) -> MegatronPolicy:
    settings = layout_options(model_dir, precision=precision, freeze_vision=freeze_vision)
    return MegatronPolicy(settings, select("cpu"), seed=0, max_steps=10)


def step(policy: MegatronPolicy) -> dict[str, float]:
    sequences = random_sequences(policy.hf_config)
    return policy.update(packer_for(policy.hf_config).pack(sequences, budget=80), toy_loss)


def weights_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.stream()}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Remembered:
    """Stands for the stream of prompts and for the estimator's history."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        return []

    def shortages(self, size: int) -> list[str]:
        return []


class Notes:
    """Stands for a log; keeps what it shows."""

    enabled = True

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def examples(self, step: int, examples: list[Any], shown: list[Any]) -> None:
        """Show none: there are none in these tests."""

    @property
    def log(self) -> MetricsLog:
        return cast(MetricsLog, self)


def make_run(directory: Path, policy: MegatronPolicy, stopping: Stopping, *overrides: str) -> tuple[Run, UpdateGuard]:
    """A run around a policy that saves every step, and its guard, which skips no update: the first ends the run."""
    keys = [
        f"logger.log_dir={directory}",
        "logger.report_enabled=false",
        "checkpointing.save_period=1",
        "policy.megatron_cfg.optimizer.max_skipped_updates=0",
    ]
    recipe = recipes.load(G2RPO, [*keys, *overrides], "train")
    guard = UpdateGuard(recipe.policy.megatron_cfg.optimizer, directory / "skipped")
    components = SimpleNamespace(
        policy=policy,
        device=policy.device,
        processor=SimpleNamespace(settings=None),
        stream=Remembered(),
        history=Remembered(),
        guard=guard,
        stopping=stopping,
    )
    return Run(recipe, cast(Components, components)), guard
