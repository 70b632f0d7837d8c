# SPDX-License-Identifier: Apache-2.0
"""The verbs of datasets: ``data import``, ``data check``, ``data show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_g2rpo.cli.arguments import Overrides
from megatron_g2rpo.cli.running import with_errors

Workers = Annotated[int, typer.Option(min=1, help="Processes that look at samples.")]
DataPath = Annotated[Path, typer.Argument(help="Dataset of shards.", metavar="DATA", show_default=False)]
OptionalRecipe = Annotated[
    Path | None,
    typer.Argument(help="Recipe whose limits, tasks and model count.", metavar="[RECIPE]", show_default=False),
]


def data_import(
    source: Annotated[Path, typer.Argument(help="File or folder to read.", metavar="SOURCE", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Directory for the shards.", metavar="OUT", show_default=False)],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the importer, key=value.", show_default=False)
    ] = None,
    importer: Annotated[str, typer.Option(help="Name of the importer; auto: told from the first row.")] = "auto",
    imports: Annotated[list[str] | None, typer.Option(help="Module or .py file with your importer or formats.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of all samples.")] = None,
    task_field: Annotated[str | None, typer.Option(help="Field with the task; dots reach into objects.")] = None,
    answer_format: Annotated[str | None, typer.Option(help="Answer format of all samples.")] = None,
    answer_format_field: Annotated[str | None, typer.Option(help="Field with the answer format.")] = None,
    map_fields: Annotated[
        list[str] | None, typer.Option("--map", metavar="FIELD=PATH", help="Where a sample's field is; repeatable.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face dataset.")] = None,
    image_dir: Annotated[Path | None, typer.Option(help="What image paths are relative to; default: SOURCE's.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and check images.")] = 1,
    decode: Annotated[bool, typer.Option(help="Decode every image, and reject a damaged one.")] = True,
    split: Annotated[
        float | None, typer.Option(help="Share of a validation part, by image: OUT/train and OUT/val.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 8192,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be imported.")] = False,
) -> None:
    """Write a dataset of another format as shards with an index.

    Exit status: 0, everything was imported; 3, some rows were rejected, and OUT.rejected.jsonl lists them; 1, an error,
    and nothing was written.
    """

    def run() -> None:
        from rich.console import Console

        from megatron_g2rpo.commands import data_import as command
        from megatron_g2rpo.data.importers.write import ImportSettings

        settings = ImportSettings(
            task=task,
            task_field=task_field,
            answer_format=answer_format,
            answer_format_field=answer_format_field,
            image_dir=image_dir,
            workers=workers,
            decode=decode,
            validation_share=split,
            limit=limit,
            samples_per_shard=shard_size,
            strict=strict,
        )
        named = {"map_fields": map_fields or [], "subset": subset}
        result = command.run(source, target, importer, options or [], imports or [], settings, **named)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for each in command.summary(result, target):
            console.print(each)
        if result.rejected:
            raise typer.Exit(command.SOME_REJECTED)

    with_errors(run)


def data_check(
    path: DataPath,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    validation: Annotated[
        Path | None, typer.Option(help="Held-out dataset that must have other images; default: the recipe's.")
    ] = None,
    workers: Workers = 1,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file for all faults.")] = None,
) -> None:
    """Look at every sample: images, references, lengths, repetitions. Exit code 1 if a run could not use them all."""

    def run() -> None:
        from megatron_g2rpo.commands import data_check as command

        if not command.run(path, recipe, overrides or [], validation=validation, workers=workers, out=out):
            raise typer.Exit(1)

    with_errors(run)


def data_show(
    path: DataPath,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Page to write (HTML).")] = Path("samples.html"),
    task: Annotated[str | None, typer.Option(help="Only samples of this task.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of samples of each task.")] = 5,
) -> None:
    """Write a page of samples, with their prompts and pictures as the model gets them."""

    def run() -> None:
        from megatron_g2rpo.commands import data_show as command

        count = command.run(path, recipe, overrides or [], out=out, task=task, limit=limit)
        typer.echo(f"wrote {count} samples to {out}")

    with_errors(run)
