# SPDX-License-Identifier: Apache-2.0
"""What this machine has that kernels depend on: the one place that looks for optional packages."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_g2rpo.policy.device import Device

# Optional package -> the module that shows it. PyPI's `apex` is an unrelated project; only NVIDIA's has `amp_C`.
OPTIONAL = {
    "transformer_engine": "transformer_engine",
    "apex": "amp_C",
    "apex_wgrad": "fused_weight_gradient_mlp_cuda",
    "flash_attn": "flash_attn",
    "flash_attn_3": "flash_attn_3",
    "vllm": "vllm",
    "wandb": "wandb",
    "nemo": "nemo",
    "matplotlib": "matplotlib",
}


@dataclass(frozen=True)
class Machine:
    """The facts that decide which kernels can run.

    Attributes:
        device: ``cpu`` or ``gpu``.
        capability: compute capability of the GPU, (9, 0) for Hopper; None on a CPU.
        cuda: version of CUDA that torch was built for, for example (13, 0); None for a CPU build.
        packages: optional package -> whether it is installed; see ``OPTIONAL``.
    """

    device: str
    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    packages: dict[str, bool]


def optional_packages() -> dict[str, bool]:
    """Return which optional packages are installed, without importing them."""
    return {name: importlib.util.find_spec(module) is not None for name, module in OPTIONAL.items()}


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def this_machine(device: Device) -> Machine:
    """Return the facts of this process's machine."""
    return Machine(device=device.kind, capability=device.capability, cuda=device.cuda, packages=optional_packages())
