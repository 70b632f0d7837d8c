# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo doctor``: what this machine has."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from megatron_g2rpo import __version__, objective
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.machine import optional_packages

REQUIRED = ("torch", "megatron-core", "transformers", "pydantic", "omegaconf", "safetensors")


def describe() -> str:
    """Find out what this machine has, as lines of ``what: value``."""
    device = select()
    lines = [
        f"megatron-g2rpo: {__version__} (Python {platform.python_version()})",
        f"device: {device.kind}, collectives over {device.backend}",
        f"group statistics op: {objective.backend()}",
        *(f"{name}: {_version(name)}" for name in REQUIRED),
        *(f"{name} (optional): {'found' if found else 'absent'}" for name, found in optional_packages().items()),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
