# SPDX-License-Identifier: Apache-2.0
"""The verbs of the two loops, ``train`` and ``sft``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_g2rpo.cli.arguments import DryRun, Fresh, Nproc, Overrides, Quiet, RecipePath
from megatron_g2rpo.cli.running import cluster_overrides, is_first, prepare_processes, with_errors, with_local_model

Replay = Annotated[
    Path | None,
    typer.Option("--replay", help="Take one step of this run again, on its recorded rollouts.", show_default=False),
]
Step = Annotated[int | None, typer.Option("--step", min=1, help="With --replay: which step.", show_default=False)]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Nproc = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
    replay: Replay = None,
    step: Step = None,
) -> None:
    """Train a policy with G2RPO."""
    if (replay is None) != (step is None):
        raise typer.BadParameter("--replay RUN and --step N go together")
    if replay is not None and step is not None:
        if dry_run or fresh or quiet:
            raise typer.BadParameter("--replay trains nothing: it takes none of --dry-run, --fresh and --quiet")
        _replay(recipe, overrides or [], nproc, replay, step)
    else:
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


def _replay(path: Path, overrides: list[str], nproc: int | None, source: Path, step: int) -> None:
    def run() -> None:
        from megatron_g2rpo import recipe as recipes
        from megatron_g2rpo.commands import launch, out_of_memory, replay
        from megatron_g2rpo.train.run.watchdog import watching

        asked = [*overrides, *cluster_overrides(nproc), *replay.overrides_for(source)]
        found = replay.find(source, step)
        if launch.is_rank():
            recipe = recipes.load(path, asked, "train")
        else:  # before any process is started
            from megatron_g2rpo.commands.preflight import checked

            recipe = checked(path, asked, "train", download=True)
        note = typer.echo if is_first() else _silent
        changed = replay.changed(recipe, found.settings)
        local, on_many = with_local_model(recipe), prepare_processes(recipe)
        if on_many:
            again = [str(path), *overrides, "--replay", str(source), "--step", str(step)]
            launch.launch(recipe.cluster.gpus_per_node, ["train", *again])
            return
        for line in changed:
            note(f"changed: {line}")
        with watching(recipe, launch.end), out_of_memory.explained(recipe):
            replay.run(local, found, note)

    with_errors(run)


def _silent(line: str) -> None:
    """Say nothing, on ranks but the first."""


def _entry(kind: str) -> Callable[..., Path | None]:
    if kind == "train":
        from megatron_g2rpo.train.g2rpo import train as entry

        return entry
    from megatron_g2rpo.train.sft import sft as entry_sft

    return entry_sft
