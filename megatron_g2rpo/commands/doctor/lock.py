# SPDX-License-Identifier: Apache-2.0
"""Whether the installed versions are those of the lock, the set of versions that belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from packaging.version import Version

from megatron_g2rpo.commands.doctor.findings import Finding
from megatron_g2rpo.commands.doctor.requirements import REPOSITORY
from megatron_g2rpo.policy.machine import Machine, all_installed

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", re.MULTILINE)


def lock_file(device: str) -> Path:
    """Return the path of the lock for a device, ``cpu`` or ``gpu``; the file may not be there."""
    return REPOSITORY / "constraints" / f"{device}.txt"


def read_lock(file: Path) -> dict[str, str]:
    """Return normalised name -> version of every pin of a constraints file."""
    return {_normalised(name): version for name, version in _PIN.findall(file.read_text())}


def findings(machine: Machine) -> Iterator[Finding]:
    """Compare what is installed with the lock of this machine's device. A difference is a warning."""
    row = partial(Finding, "lock")
    file = lock_file(machine.device)
    if not file.is_file():
        why = "installed without the repository, whose constraints/ has the versions that were tested together"
        yield row("constraints", "none", "absent", why)
        return
    pins, installed = read_lock(file), all_installed()
    both = sorted(pins.keys() & installed.keys())
    other = [name for name in both if Version(installed[name]).public != Version(pins[name]).public]
    text = f"{len(both) - len(other)} of {len(both)} installed packages of constraints/{file.name} have its version"
    yield row("constraints", text)
    for name in other:
        yield row(name, installed[name], "warning", f"the lock has {pins[name]}")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
