# SPDX-License-Identifier: Apache-2.0
"""Names of environment variables that a recipe may set for the training processes (``env_vars``)."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# What torchrun tells each process about itself: all ranks would be one.
_LAUNCHER = frozenset(
    {
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    }
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "MEGATRON_G2RPO_", "SLURM_")
# Which GPUs a process may see is the machine's matter; the rank takes the one of its number among them.
_MACHINE = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"})
# Read when a process starts or loads torch, which is before it has read a recipe.
_READ_BEFORE = frozenset({"PATH", "HOME", "VIRTUAL_ENV"})
_READ_BEFORE_PREFIXES = ("LD_", "PYTHON", "OMP_", "KMP_", "MKL_", "GOMP_")


def faults(names: Iterable[str]) -> dict[str, str]:
    """Return name -> what is wrong with it, text that begins with the name, for those that a recipe may not set."""
    return {name: f"{name!r} {reason}" for name in names if (reason := _fault(name)) is not None}


def _fault(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return "is no name of an environment variable: letters, digits and underscores, and no digit first"
    if name in _LAUNCHER or name.startswith(_LAUNCHER_PREFIXES):
        return "is set by the launcher, for each process its own"
    if name in _MACHINE:
        return "says which GPUs of a machine are visible: set it where the processes are started"
    if name in _READ_BEFORE or name.startswith(_READ_BEFORE_PREFIXES):
        return "is read when a process starts, before it has read the recipe: export it where it is started"
    return None
