# SPDX-License-Identifier: Apache-2.0
"""Environment variables of the training processes, from ``policy.megatron_cfg.env_vars``.

Transformer Engine reads some when it is imported, CUDA and NCCL when they start. So the command line sets them as soon
as it has read the recipe, and the policy checks that somebody has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_g2rpo.policy.device import DeviceError


def set_environment(env_vars: Mapping[str, str]) -> None:
    """Set variables in this process and in those that it starts; they replace what is inherited."""
    os.environ.update(env_vars)


def check_environment(env_vars: Mapping[str, str]) -> None:
    """Check that a recipe's variables are set.

    Raises:
        DeviceError: some are not, which would leave settings without effect; names them.
    """
    missing = sorted(name for name, value in env_vars.items() if os.environ.get(name) != value)
    if missing:
        raise DeviceError(
            f"policy.megatron_cfg.env_vars sets {', '.join(missing)}, and this process has other values: call "
            "megatron_g2rpo.policy.environment.set_environment before anything imports megatron-core"
        )
