# SPDX-License-Identifier: Apache-2.0
"""The verbs that measure a model: ``logprobs`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_g2rpo.cli.arguments import MaybeRecipe, Nproc, Overrides, recipe_of
from megatron_g2rpo.cli.running import cluster_overrides, is_first, policy_recipe, prepare_processes, with_errors

if TYPE_CHECKING:
    from megatron_g2rpo.commands.eval.settings import Request


def logprobs(
    model: Annotated[Path, typer.Option("--model", help="Hugging Face directory.")],
    source: Annotated[Path, typer.Option("--input", help="JSON lines to read: prompt, images, response.")],
    target: Annotated[Path, typer.Option("--output", help="JSON lines to write: token_ids, logprobs, entropies.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
) -> None:
    """Compute log-probabilities and entropies of given responses. Overrides set the layout (keys of policy.*)."""
    with_errors(lambda: _logprobs(model, source, target, overrides or [], nproc))


def evaluate(
    arguments: MaybeRecipe = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face directory; default: policy.model_name.")] = None,
    data: Annotated[str | None, typer.Option(help="Shards; default: data.validation.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write; default: eval/MODEL-DATA.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples of each task; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: greedy. Default: 0; with several samples, policy.generation.val_temperature."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    pass_threshold: Annotated[
        list[str] | None,
        typer.Option(help="Accuracy from which a response is a success (pass@k), NUMBER or TASK=NUMBER; default: 1."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Earlier evaluation to compare with, prompt by prompt.")
    ] = None,
    nproc: Nproc = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier evaluation aside; do not go on.")] = False,
) -> None:
    """Evaluate a model on a dataset: of a recipe, or any with --model and --data. The same command again goes on.

    Accuracy, format, length and pass@k of each task with confidence intervals; every answer in OUT/answers.jsonl.
    """
    given = list(arguments or [])
    recipe = recipe_of(given)

    def run() -> None:
        from megatron_g2rpo.commands.eval.settings import Request

        request = Request(
            recipe=recipe,
            overrides=tuple(given),
            model=model,
            data=data,
            out=out,
            limit=limit,
            samples=samples,
            temperature=temperature,
            seed=seed,
            pass_thresholds=tuple(pass_threshold or ()),
            compare=compare,
            fresh=fresh,
        )
        _evaluate(request, nproc)

    with_errors(run)


def _logprobs(model: Path, source: Path, target: Path, overrides: list[str], nproc: int | None) -> None:
    recipe = policy_recipe([f"policy.model_name={model}", "policy.precision=float32", *overrides], nproc)
    if prepare_processes(recipe):
        from megatron_g2rpo.commands.launch import launch

        arguments = ["logprobs", "--model", str(model), "--input", str(source), "--output", str(target), *overrides]
        launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.commands.logprobs import logprobs as run

    lines = run(recipe, source, target)
    if is_first():
        typer.echo(f"wrote {lines} lines to {target}")


def _evaluate(request: Request, nproc: int | None) -> None:
    from megatron_g2rpo.commands.eval import run
    from megatron_g2rpo.commands.eval.settings import completed
    from megatron_g2rpo.commands.launch import launch

    settings = completed(request, cluster_overrides(nproc))
    if prepare_processes(settings.recipe):
        launch(settings.recipe.cluster.gpus_per_node, request.arguments())
        return
    run.evaluate(request, settings)
