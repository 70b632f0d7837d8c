# SPDX-License-Identifier: Apache-2.0
"""What the tests of checkpoints share: a tiny policy, a step of it, and its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
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
