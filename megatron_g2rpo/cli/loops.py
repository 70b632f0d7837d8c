# SPDX-License-Identifier: Apache-2.0
"""The verbs of the two loops, ``train`` and ``sft``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import typer

from megatron_g2rpo.cli.arguments import DryRun, Fresh, Nproc, Overrides, Quiet, RecipePath
from megatron_g2rpo.cli.running import cluster_overrides, is_first, prepare_processes, with_errors, with_local_model


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Nproc = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Train a policy with G2RPO."""
    _loop("train", recipe, overrides or [], nproc, dry_run=dry_run, fresh=fresh, quiet=quiet)


def sft(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Nproc = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Train a policy on the responses of a dataset (the warm start of G2RPO)."""
    _loop("sft", recipe, overrides or [], nproc, dry_run=dry_run, fresh=fresh, quiet=quiet)


def _loop(
    kind: Literal["train", "sft"],
    path: Path,
    overrides: list[str],
    nproc: int | None,
    *,
    dry_run: bool,
    fresh: bool,
    quiet: bool,
) -> None:
    def run() -> None:
        from megatron_g2rpo import recipe as recipes
        from megatron_g2rpo.commands import launch

        asked = [*overrides, *cluster_overrides(nproc)]
        if launch.is_rank():
            recipe = recipes.load(path, asked, kind)
        else:  # before any process is started
            from megatron_g2rpo.commands.preflight import checked

            recipe = checked(path, asked, kind, download=not dry_run)
        if dry_run:
            typer.echo(recipes.dump(recipe))
            typer.echo(recipes.describe_layout(recipe))
            return
        from megatron_g2rpo.commands import out_of_memory
        from megatron_g2rpo.commands.preamble import preamble
        from megatron_g2rpo.train.run import directory
        from megatron_g2rpo.train.run.trackers import feed as trackers
        from megatron_g2rpo.train.run.watchdog import watching

        trackers.require(recipe.logger)  # before anything is written
        local, on_many = with_local_model(recipe), prepare_processes(recipe)
        with ExitStack() as held:
            if is_first() and launch.is_launched():
                held.enter_context(directory.joined(recipe))
            elif is_first():
                for note in held.enter_context(directory.claimed(recipe, fresh=fresh)):
                    if not quiet or note.startswith("warning: "):
                        typer.echo(note)
            if on_many:
                options = ["--quiet"] if quiet else []
                launch.launch(recipe.cluster.gpus_per_node, [kind, str(path), *options, *overrides], stoppable=True)
                return
            entry = _entry(kind)  # what it imports takes seconds, and is not watched
            if is_first() and not quiet:
                for line in preamble(local):
                    typer.echo(line)
            with watching(recipe, launch.end), out_of_memory.explained(recipe):
                exported = entry(local, quiet=quiet)
        if exported is not None and is_first() and not quiet:
            typer.echo(f"Hugging Face checkpoint: {exported}")

    if dry_run:
        with_errors(run)
        return
    from megatron_g2rpo.train.run import signals

    with signals.watched():  # before torch is imported, which takes seconds
        with_errors(run)


def _entry(kind: str) -> Callable[..., Path | None]:
    if kind == "train":
        from megatron_g2rpo.train.g2rpo import train as entry

        return entry
    from megatron_g2rpo.train.sft import sft as entry_sft

    return entry_sft
