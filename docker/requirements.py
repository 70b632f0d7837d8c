# SPDX-License-Identifier: Apache-2.0
"""Prints what the image needs beside what NVIDIA's image has: pins of constraints/gpu.txt, a line each.

    python docker/requirements.py HELD > requirements.txt

HELD is a file of NAME==VERSION lines that stay as they are. This package's own requirements are listed, and pybind11 to
build its op; what they require in turn is left to pip, which is given HELD as constraints.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("report",)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def name_of(requirement: str) -> str:
    """Return the normalised name of a requirement."""
    found = _NAME.match(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} is no requirement")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def pins(lines: str) -> dict[str, str]:
    """Return normalised name -> version of NAME==VERSION lines."""
    found = (line.split("#")[0].strip().partition("==") for line in lines.splitlines())
    return {name_of(name): version for name, equal, version in found if equal}


def requirements(pyproject: str, lock: str, held: str) -> list[str]:
    """Return the pins to install.

    Args:
        pyproject: text of pyproject.toml.
        lock: text of constraints/gpu.txt.
        held: NAME==VERSION lines of what must stay.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    names = [name_of(each) for each in [*project["dependencies"], *extras, "pybind11"]]
    locked, kept = pins(lock), pins(held)
    return [f"{name}=={locked[name]}" for name in names if name not in kept]


def main() -> None:
    """Print the pins."""
    texts = (ROOT / "pyproject.toml", ROOT / "constraints" / "gpu.txt", Path(sys.argv[1]))
    print("\n".join(requirements(*(text.read_text() for text in texts))))


if __name__ == "__main__":
    main()
