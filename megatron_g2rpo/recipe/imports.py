# SPDX-License-Identifier: Apache-2.0
"""``imports``: a user's modules, imported in every process that loads the recipe, before its names are checked.

An entry is a dotted module, which Python finds in its environment or in the working directory, or the path of a ``.py``
file relative to the recipe that contains the entry (on the command line: to the working directory). The imports of a
recipe are added to those of its parents, because the parents need theirs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_g2rpo.recipe.errors import Origin, RecipeError
from megatron_g2rpo.recipe.paths import expanded
from megatron_g2rpo.registry import KINDS

IMPORTS = "imports"


def as_written(value: Any, folder: Path, origin: Origin | str) -> list[str]:
    """Return the entries of one document, with absolute paths of files.

    Args:
        value: the value of the key ``imports``.
        folder: the folder that paths of files are relative to.
        origin: the place where the value was written.

    Raises:
        RecipeError: the value is not a list of modules and files, or a file is missing.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise RecipeError(f"{origin}: {IMPORTS} must be a list of dotted modules or .py files, got {value!r}")
    return [_located(entry, folder, origin) for entry in entries]


def import_all(entries: list[str], origin: Origin | str | None) -> None:
    """Import each entry that this process has not imported before.

    Raises:
        RecipeError: an import fails; the message names the entry, and the file and line that raised.
    """
    for entry in entries:
        try:
            if entry.endswith(".py"):
                _import_file(Path(entry))
            else:
                _import_module(entry)
        except Exception as error:  # whatever a user's module raises is re-raised with its place
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{origin}: " if origin else ""
            raise RecipeError(
                f"{where}{IMPORTS}: {entry} cannot be imported: {type(error).__name__}: {error} "
                f"({last.filename}:{last.lineno})"
            ) from error


def _located(entry: str, folder: Path, origin: Origin | str) -> str:
    if not entry.endswith(".py"):
        return entry
    try:
        path = Path(os.path.abspath(folder / expanded(entry)))
    except KeyError as error:
        raise RecipeError(
            f"{origin}: {IMPORTS} names {entry}: the environment variable {error.args[0]} is not set here"
        ) from error
    if not path.is_file():
        raise RecipeError(f"{origin}: {IMPORTS} names {entry}: there is no file {path}")
    return str(path)


def _import_module(name: str) -> None:
    # A process that starts with `python -m` looks into the working directory, one that starts as a command does not.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.import_module(name)


def _import_file(path: Path) -> None:
    # The path is part of the name: two users may have a file called rewards.py.
    name = f"_imported_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Files beside it can be imported, as beside a script; last, so that none hides an installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        for kind in KINDS:
            kind.forget(str(path))
        raise
