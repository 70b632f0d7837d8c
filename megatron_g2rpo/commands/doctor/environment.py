# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` says about hardware and packages."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from functools import partial

from megatron_g2rpo import __version__, objective
from megatron_g2rpo.commands.doctor.findings import Finding
from megatron_g2rpo.commands.doctor.requirements import violated
from megatron_g2rpo.policy.device import Device, hardware
from megatron_g2rpo.policy.machine import (
    OPTIONAL,
    Machine,
    broken_imports,
    distribution_of,
    foreign_apex,
    installed_version,
)
from megatron_g2rpo.policy.transformer_engine_probe import Answer

# Packages that every run uses, beside those that decide about kernels.
REQUIRED = ("torch", "transformers", "pydantic", "omegaconf", "safetensors")

# Optional package -> what it is for, said where it is absent.
_PURPOSE = {
    "apex": "fused optimizer and norms where there is no Transformer Engine",
    "apex_wgrad": "gradient_accumulation_fusion",
    "flash_attn": "attention that Transformer Engine may choose; cuDNN's does as well",
    "flash_attn_3": "attention that Transformer Engine may choose on Hopper",
    "flash_attn_4": "attention that Transformer Engine may choose on Blackwell",
    "vllm": "rollouts (policy.generation.backend)",
    "nemo": "no run: recipes only share its names of keys",
    "matplotlib": "megatron-g2rpo report --picture",
    "wandb": "logger.wandb_enabled",
    "trackio": "logger.trackio_enabled",
}
_SHOWN_AS = {
    "apex": "NVIDIA apex",
    "apex_wgrad": "apex: weight gradients",
    "flash_attn": "flash-attn 2",
    "flash_attn_3": "flash-attn 3",
    "flash_attn_4": "flash-attn 4",
    "vllm": "vLLM",
    "nemo": "nemo-toolkit",
    "wandb": "Weights & Biases",
}
_TE = "transformer_engine"
_INSTALL_TE = "docs/install-gpu.md says how"


def hardware_findings(device: Device) -> Iterator[Finding]:
    """Say what the hardware is, and what torch makes of it."""
    row = partial(Finding, "hardware")
    found = hardware(device)
    yield row("megatron-g2rpo", f"{__version__}, Python {platform.python_version()}")
    if device.kind == "gpu":
        memory = 0.0 if found.memory is None else found.memory / 1e9
        capability = ".".join(map(str, device.capability or ()))
        text = f"{found.count} x {found.name}, {memory:.0f} GB, compute capability {capability}"
        if found.virtual:
            why = "host memory that poses as a GPU (tests/gpu): nothing seen here was seen on a GPU"
            yield row("device", text, "warning", why)
        else:
            yield row("device", text)
    else:
        yield row("device", f"cpu, {platform.machine()}")
    yield _driver(found.driver, found.cuda_version, device.kind)
    yield row(
        "CUDA of torch",
        found.cuda_version or "none",
        "ok" if found.cuda_version else "absent",
        "" if found.cuda_version else "CPU build",
    )
    for what, value in (("cuDNN", found.cudnn), ("NCCL", found.nccl)):
        yield row(what, value or "none", "ok" if value else "absent")
    yield row("collectives", device.backend)
    compiled = objective.backend() == "cpp"
    slower = "advantages are computed by torch, slower; reinstall with a C++17 compiler, MEGATRON_G2RPO_BUILD_EXT=1"
    yield row("group statistics op", objective.backend(), "ok" if compiled else "warning", "" if compiled else slower)


def _driver(driver: str | None, cuda: str | None, kind: str) -> Finding:
    row = partial(Finding, "hardware", "NVIDIA driver")
    if kind == "gpu" or driver is None:
        return row(driver or "none", "ok" if driver else "absent")
    if cuda is None:
        return row(driver, "warning", "a driver is loaded, but this torch is a CPU build: runs are on the CPU")
    return row(
        driver, "warning", f"torch for CUDA {cuda} sees no GPU: none is visible, or the driver is too old for it"
    )


def package_findings(machine: Machine, answer: Answer | None, needed: Mapping[str, str]) -> Iterator[Finding]:
    """Say which packages are there, and whether they can be imported.

    Args:
        machine: see ``machine.this_machine``.
        answer: Transformer Engine's; None where it is not installed.
        needed: optional package -> what of the recipe needs it.
    """
    row = partial(Finding, "packages")
    installed = [name for name in OPTIONAL if machine.packages[name] and name != _TE]
    broken = broken_imports(["megatron-core", *installed])
    for name in REQUIRED:
        found = installed_version(name)
        yield row(name, found or "absent", "ok" if found else "error", "" if found else "needed by every run")
    yield _megatron_core(broken.get("megatron-core"), answer)
    for message in violated():
        yield row("requirement", message.what, message.status, message.why)
    yield from _transformer_engine(machine, answer, needed)
    if wrong := foreign_apex():
        yield row("apex", (distribution_of("apex") or ("", "unknown version"))[1], "error", wrong)
    for name in OPTIONAL:
        if name != _TE:
            yield _optional(name, machine, broken.get(name), needed.get(name))


def _megatron_core(error: str | None, answer: Answer | None) -> Finding:
    row = partial(Finding, "packages", "megatron-core", installed_version("megatron-core") or "absent")
    if error is None:
        return row()
    if answer is not None and answer.core_error is not None:
        error = f"it dies of Transformer Engine, see below ({error})"
    return row("error", f"cannot be imported: {error}")


def _transformer_engine(machine: Machine, answer: Answer | None, needed: Mapping[str, str]) -> Iterator[Finding]:
    """Its Python layers, its core library and its PyTorch part, which are three packages on PyPI."""
    row = partial(Finding, "packages")
    if answer is None:
        use = needed.get(_TE)
        yield row("Transformer Engine", "absent", "error" if use else "absent", f"{use}; {_INSTALL_TE}" if use else "")
        return
    parts = {part: distribution_of(part) for part in (_TE, f"{_TE}_core", f"{_TE}_torch")}
    versions = {part: found and f"{found[1]} ({found[0]})" for part, found in parts.items()}
    yield row("Transformer Engine", versions[_TE] or "found")
    errors = {"core": answer.core_error, "torch": answer.torch_error}
    for part, what in (("core", "TE: core library"), ("torch", "TE: PyTorch part")):
        value = versions[f"{_TE}_{part}"]
        if errors[part] is not None:
            trap = "megatron-core catches ImportError alone: " if part == "core" else ""
            yield row(what, value or "absent", "error", f"{trap}{errors[part]} {_INSTALL_TE}, or uninstall it")
        elif part == "torch" and answer.core_error is not None:
            yield row(what, value or "absent", "absent", "not tried: the core cannot be loaded")
        else:
            yield row(what, value or "loads, and is in no package of its own")
    if len({found[1] for found in parts.values() if found is not None}) > 1:
        yield row("TE: versions", "differ", "error", "its parts must have one version")


def _optional(name: str, machine: Machine, error: str | None, use: str | None) -> Finding:
    row = partial(Finding, "packages", _SHOWN_AS.get(name, name))
    if not machine.packages[name]:
        return row("absent", "error" if use else "absent", use or f"for {_PURPOSE[name]}")
    found = distribution_of(name)
    value = "found" if found is None else found[1] if found[0] == name else f"{found[1]} ({found[0]})"
    return row(value) if error is None else row(value, "error", f"cannot be imported: {error}")
