# SPDX-License-Identifier: Apache-2.0
"""Whether the installed packages are what this package asks for."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_g2rpo.policy.machine import installed_version

# The repository that this package lies in, if it is installed from one.
REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class Violation:
    """A requirement that is not met.

    Attributes:
        what: the requirement and what is installed.
        status: ``error``; or ``warning`` for a version just before the one that is asked for.
        why: what it means.
    """

    what: str
    status: Literal["warning", "error"]
    why: str


def requirements() -> list[Requirement]:
    """Return what this package requires on this platform, without extras."""
    pyproject = REPOSITORY / "pyproject.toml"
    if pyproject.is_file():
        texts = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        try:
            texts = requires("megatron-g2rpo") or []
        except PackageNotFoundError:
            texts = []
    found = [Requirement(text) for text in texts]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def violated() -> Iterator[Violation]:
    """Yield the requirements that are not met."""
    for each in requirements():
        found = installed_version(each.name)
        if found is None:
            yield Violation(f"{each} is not installed", "error", "pip install it, with the lock")
        elif (violation := _compare(each, Version(found))) is not None:
            yield violation


def _compare(required: Requirement, found: Version) -> Violation | None:
    if required.specifier.contains(found, prereleases=True):
        return None
    what = f"{required}, and {found} is installed"
    if found.is_prerelease and required.specifier.contains(found.base_version):
        # NVIDIA's containers carry builds of torch that are named so.
        return Violation(what, "warning", "a build from before that release; what has been tested is the release")
    return Violation(what, "error", "install a version that it allows, see constraints/")
