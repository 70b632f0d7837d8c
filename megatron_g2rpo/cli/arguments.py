# SPDX-License-Identifier: Apache-2.0
"""Arguments that several verbs take, and how they are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="Path of the recipe (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of recipe keys, key=value.", show_default=False)]
Nproc = Annotated[int | None, typer.Option("--nproc", min=1, help="Processes on this machine (cluster.gpus_per_node).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the layout; run nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an earlier run directory aside instead of resuming it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors alone.")]
MaybeRecipe = Annotated[
    list[str] | None,
    typer.Argument(
        help="Path of a recipe (YAML), and overrides of its keys, key=value.",
        metavar="[RECIPE] [OVERRIDES]...",
        show_default=False,
    ),
]


def recipe_of(arguments: list[str]) -> Path | None:
    """Take the recipe from arguments that begin with one, unless they are overrides alone."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return Path(arguments.pop(0))
    return None
