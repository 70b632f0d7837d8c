# SPDX-License-Identifier: Apache-2.0
"""The verbs around a run: ``plan``, ``doctor``, ``serve``, ``report``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_g2rpo.cli.arguments import MaybeRecipe, Nproc, Overrides, RecipePath, recipe_of
from megatron_g2rpo.cli.running import cluster_overrides, is_first, prepare_processes, with_errors, with_local_model


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    card: Annotated[str, typer.Option(help="The GPU: a100-40, a100, h100, h100-nvl, h200 or b200.")] = "h100",
    gpu_memory_gb: Annotated[
        float | None, typer.Option(min=1, help="Memory of one GPU, 10^9 bytes; default: the card's.")
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(help="Mean tokens per sequence; default: the longest allowed.")
    ] = None,
    image_tokens: Annotated[int | None, typer.Option(help="Image tokens per prompt; default: as many as fit.")] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="Mean tokens of a response; default: all that is no image.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Propose layouts and engines instead, fastest first.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of --sweep; default: the recipe's.")] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Also run a step of one rank of some stages, on tensors without values."),
    ] = False,
) -> None:
    """Check a layout before any GPU is asked for: memory, traffic, time. Exit code 1 if it does not fit."""

    def run() -> None:
        from megatron_g2rpo.commands import plan

        machines = plan.Machines(
            card=card,
            gpu_memory_gb=gpu_memory_gb,
            mean_tokens=mean_tokens,
            image_tokens=image_tokens,
            response_tokens=response_tokens,
        )
        if sweep:
            fits = plan.run_sweep(recipe, overrides or [], machines, gpus, as_json=as_json)
        else:
            fits = plan.run(recipe, overrides or [], machines, as_json=as_json, rehearse=rehearse)
        if not fits:
            raise typer.Exit(1)

    with_errors(run)


def doctor(
    arguments: MaybeRecipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    rollout: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Sample a few responses; compare engine and trainer token by token."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts for --rollout.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Number of responses to each prompt.")] = 1,
    nproc: Nproc = None,
) -> None:
    """Show what this machine has and what a recipe would run on; or check a recipe's rollouts.

    Exit code 1 if something that is needed is missing, or something that is installed is broken.
    """
    given = list(arguments or [])
    if rollout is not None:
        path = rollout
        with_errors(lambda: _compare(path, given, prompts, samples, nproc))
        return

    def run() -> None:
        from megatron_g2rpo.commands import doctor

        recipe = recipe_of(given)
        overrides = [*given, *cluster_overrides(nproc)]
        if recipe is None and overrides:
            raise ValueError(f"doctor: {overrides[0]} is an override, and there is no recipe to override")
        if not doctor.run(recipe, overrides, json=as_json):
            raise typer.Exit(1)

    with_errors(run)


def serve(
    recipe: RecipePath,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Start a vLLM server that gives a run its rollouts (policy.generation.backend=vllm_server)."""
    with_errors(lambda: _serve(recipe, overrides or [], host, port))


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN [RUN_B]", help="Run directory; two are laid over another.")
    ],
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on this machine until Ctrl-C.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of --serve; default: a free one.", show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write the page anew when the run goes on.")] = False,
    picture: Annotated[
        bool, typer.Option("--picture", help="Also draw RUN/report/rewards.png: rewards before and after.")
    ] = False,
) -> None:
    """Write a page about a run, RUN/report/report.html: charts, and the answers of the policy. It needs no network.

    That of two runs is RUN/report/report-and-RUN_B.html.
    """
    if port is not None and not serve:
        raise typer.BadParameter("--port is that of --serve")

    def run() -> None:
        from megatron_g2rpo.report import serve as serving
        from megatron_g2rpo.report.page import write_page

        if picture:
            from megatron_g2rpo.report.rewards import draw

            for each in runs:
                typer.echo(f"wrote {draw(each)}")
        if serve:
            serving.serve(runs, port or 0, typer.echo, watching=watch)
        elif watch:
            with contextlib.suppress(KeyboardInterrupt):
                serving.watch(
                    runs,
                    lambda path: typer.echo(f"wrote {path}"),
                    lambda error: typer.echo(f"warning: {error}", err=True),
                )
        else:
            typer.echo(f"wrote {write_page(runs)}")

    with_errors(run)


def _compare(path: Path, overrides: list[str], prompts: int, samples: int, nproc: int | None) -> None:
    from megatron_g2rpo import recipe as recipes
    from megatron_g2rpo.commands.launch import launch

    recipe = with_local_model(recipes.load(path, [*overrides, *cluster_overrides(nproc)], "train"))
    if prepare_processes(recipe):
        options = [f"--rollout={path}", f"--prompts={prompts}", f"--samples={samples}"]
        launch(recipe.cluster.gpus_per_node, ["doctor", *options, *overrides])
        return
    from megatron_g2rpo.commands.compare_rollouts import compare

    lines = compare(recipe, prompts, samples)
    if is_first():
        typer.echo("\n".join(lines))


def _serve(path: Path, overrides: list[str], host: str, port: int) -> None:
    from megatron_g2rpo import recipe as recipes
    from megatron_g2rpo.commands.model_dir import with_local_model
    from megatron_g2rpo.rollout.base import needs_vllm

    recipe = with_local_model(recipes.load(path, overrides, "train"))
    with needs_vllm("megatron-g2rpo serve"):
        from megatron_g2rpo.rollout.vllm import serve
    command, environment = serve.command(recipe.policy, host, port)
    os.execve(command[0], command, {**os.environ, **environment})
