# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``megatron-g2rpo``. Thin: parse, launch, call, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides.", show_default=False)]
Nproc = Annotated[int | None, typer.Option("--nproc", min=1, help="Processes on this machine (cluster.gpus_per_node).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the layout; run nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an earlier run directory aside instead of resuming it.")]


@app.command()
def train(
    recipe: RecipePath, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Train a policy with G2RPO."""
    _loop("train", recipe, overrides or [], nproc, dry_run, fresh)


@app.command()
def sft(
    recipe: RecipePath, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Train a policy on the responses of a dataset (the warm start of G2RPO)."""
    _loop("sft", recipe, overrides or [], nproc, dry_run, fresh)


@app.command()
def logprobs(
    model: Annotated[Path, typer.Option("--model", help="Hugging Face directory.")],
    source: Annotated[Path, typer.Option("--input", help="JSON lines: prompt, images, response.")],
    target: Annotated[Path, typer.Option("--output", help="JSON lines: token_ids, logprobs, entropies.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
) -> None:
    """Log-probabilities and entropies of given responses, at any layout (keys of a recipe's policy section)."""
    _with_errors(lambda: _logprobs(model, source, target, overrides or [], nproc))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Draw a run's rewards per task, before and after, to RUN/report."""
    from megatron_g2rpo.report.rewards import draw

    _with_errors(lambda: typer.echo(f"wrote {draw(run)}"))


@app.command()
def doctor() -> None:
    """Say what this machine has: device, versions, optional packages, the compiled op."""
    from megatron_g2rpo.report.doctor import describe

    typer.echo(describe())


def _loop(
    kind: Literal["train", "sft"], path: Path, overrides: list[str], nproc: int | None, dry_run: bool, fresh: bool
) -> None:
    def run() -> None:
        from megatron_g2rpo import recipe as recipes

        # Validated before any process is started.
        recipe = recipes.load(path, [*overrides, *_cluster(nproc)], kind)
        if dry_run:
            typer.echo(recipes.dump(recipe))
            typer.echo(recipes.describe_layout(recipe))
            return
        if _launch_needed(recipe.cluster.gpus_per_node, recipe.cluster.num_nodes):
            flags = ["--fresh"] if fresh else []
            _launch(recipe.cluster.gpus_per_node, [kind, str(path), *flags, *overrides])
            return
        from megatron_g2rpo.train import run_dir
        from megatron_g2rpo.train.model_dir import with_local_model

        recipe = with_local_model(recipe)
        if int(os.environ.get("RANK", "0")) == 0:
            run_dir.prepare(recipe, fresh=fresh)
        exported = _entry(kind)(recipe)
        if exported is not None and int(os.environ.get("RANK", "0")) == 0:
            typer.echo(f"Hugging Face checkpoint: {exported}")

    _with_errors(run)


def _entry(kind: str) -> Callable[..., Path | None]:
    if kind == "train":
        from megatron_g2rpo.train.g2rpo import train as entry

        return entry
    from megatron_g2rpo.train.sft import sft as entry_sft

    return entry_sft


def _logprobs(model: Path, source: Path, target: Path, overrides: list[str], nproc: int | None) -> None:
    from megatron_g2rpo import recipe as recipes

    named = [f"policy.model_name={model}", "policy.precision=float32", *overrides]
    recipe = recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", [*named, *_cluster(nproc)], "sft")
    if _launch_needed(recipe.cluster.gpus_per_node, recipe.cluster.num_nodes):
        arguments = ["logprobs", "--model", str(model), "--input", str(source), "--output", str(target), *overrides]
        _launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.train.logprobs import logprobs as run
    from megatron_g2rpo.train.model_dir import with_local_model

    lines = run(with_local_model(recipe), source, target)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"wrote {lines} lines to {target}")


def _cluster(nproc: int | None) -> list[str]:
    """Overrides of the cluster's size: torchrun's word first, then ``--nproc``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return [f"cluster.gpus_per_node={local}", f"cluster.num_nodes={world // local}"]
    return [] if nproc is None else [f"cluster.gpus_per_node={nproc}", "cluster.num_nodes=1"]


def _launch_needed(processes: int, nodes: int) -> bool:
    if "RANK" in os.environ:
        return False
    if nodes > 1:
        raise ValueError(
            f"the recipe asks for {nodes} nodes of {processes} processes: start it with `sbatch slurm/train_g2rpo.sh`, "
            "or on this machine alone with --nproc N"
        )
    return processes > 1


def _launch(processes: int, arguments: list[str]) -> None:
    """Start this command again under torchrun, on every rank."""
    from torch.distributed.run import main

    main(["--standalone", f"--nproc-per-node={processes}", "-m", "megatron_g2rpo.cli", *arguments])


def _with_errors(run: Callable[[], None]) -> None:
    """Run a verb; an error that a user can mend is printed without its traceback, and ends the job."""
    from megatron_g2rpo.tasks.rewards import RewardError

    try:
        run()
    except ChildFailedError:
        sys.exit(1)  # the rank that failed has said why
    except (ValueError, RewardError, FileNotFoundError) as error:
        if os.environ.get("MEGATRON_G2RPO_TRACEBACK"):
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        # Not sys.exit: a rank must not wait for its peers' collectives in interpreter shutdown.
        sys.stderr.flush()
        os._exit(1) if "RANK" in os.environ else sys.exit(1)


if __name__ == "__main__":
    app()
