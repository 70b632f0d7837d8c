# SPDX-License-Identifier: Apache-2.0
"""Makes an installed package look as if it were not there, to every way of asking."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def hide(package: str) -> None:
    """Let nothing find a top-level package, neither ``import`` nor ``importlib.util.find_spec``."""
    real = PathFinder.find_spec

    def find_spec(
        cls: type[PathFinder], fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname == package else real(fullname, path, target)

    finder = next(each for each in sys.meta_path if each is PathFinder)
    finder.find_spec = classmethod(find_spec)  # others keep it as an attribute of theirs, where a function would bind
