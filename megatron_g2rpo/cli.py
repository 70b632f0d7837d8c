# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``megatron-g2rpo``. Thin: parse, launch, call, print."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from megatron_g2rpo.recipe import Recipe

R = TypeVar("R", bound=Recipe)

# Read by OpenMP when torch is loaded. Its default, spinning, made a step on a CPU that something else also used five
# times slower; waiting costs a fifth on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu_memory_gb: Annotated[float, typer.Option(min=1, help="Memory of one GPU, 10^9 bytes.")] = 80.0,
    mean_tokens: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the longest.")] = None,
    image_tokens: Annotated[int | None, typer.Option(help="Image tokens of a prompt; default: as many as fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check a layout before any GPU is asked for: memory, micro-batches, traffic. Exit code 1 if it does not fit."""

    def run() -> None:
        from megatron_g2rpo.plan import command

        arguments = {"gpu_memory_gb": gpu_memory_gb, "mean_tokens": mean_tokens, "image_tokens": image_tokens}
        if not command.run(recipe, overrides or [], **arguments, as_json=as_json):
            raise typer.Exit(1)

    _with_errors(run)


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
        from megatron_g2rpo.train import launch, run_dir

        local, on_many = _with_local_model(recipe), _launch_needed(recipe)
        if not launch.is_launched() and _is_first():
            run_dir.prepare(recipe, fresh=fresh)
        if on_many:
            launch.launch(recipe.cluster.gpus_per_node, [kind, str(path), *overrides])
            return
        exported = _entry(kind)(local)
        if exported is not None and _is_first():
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
    local = _with_local_model(recipe)
    if _launch_needed(recipe):
        from megatron_g2rpo.train.launch import launch

        arguments = ["logprobs", "--model", str(model), "--input", str(source), "--output", str(target), *overrides]
        launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.train.logprobs import logprobs as run

    lines = run(local, source, target)
    if _is_first():
        typer.echo(f"wrote {lines} lines to {target}")


def _with_local_model(recipe: R) -> R:
    """The recipe with ``policy.model_name`` as a directory whose model can be split as the recipe asks."""
    from megatron_g2rpo.policy.layout import check_model_dir, layout_of
    from megatron_g2rpo.train.model_dir import with_local_model

    local = with_local_model(recipe)
    check_model_dir(local.policy.model_name, layout_of(local.policy.megatron_cfg))
    return local


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _cluster(nproc: int | None) -> list[str]:
    """Overrides of the cluster's size: torchrun's word first, then ``--nproc``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return [f"cluster.gpus_per_node={local}", f"cluster.num_nodes={world // local}"]
    return [] if nproc is None else [f"cluster.gpus_per_node={nproc}", "cluster.num_nodes=1"]


def _launch_needed(recipe: Recipe) -> bool:
    nodes, processes = recipe.cluster.num_nodes, recipe.cluster.gpus_per_node
    if "RANK" in os.environ:
        return False
    if nodes > 1:
        raise ValueError(
            f"the recipe asks for {nodes} nodes of {processes} processes: start it with `sbatch slurm/train_g2rpo.sh`, "
            "or on this machine alone with --nproc N"
        )
    return processes > 1


def _with_errors(run: Callable[[], None]) -> None:
    """Run a verb. An error that a user can mend is printed without its traceback."""
    from megatron_g2rpo.train import launch

    try:
        run()
    except launch.EXPECTED as error:
        launch.end(error)
    except BaseException as error:
        if not launch.is_rank():
            raise
        launch.end(error)


if __name__ == "__main__":
    app()
