# SPDX-License-Identifier: Apache-2.0
"""The verbs ``convert import`` and ``convert export``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_g2rpo.cli.arguments import Nproc, Overrides
from megatron_g2rpo.cli.running import is_first, policy_recipe, prepare_processes, with_errors


def _checked_size(text: str) -> str:
    """Return a size as it was given, if it is one."""
    size = re.fullmatch(r"(\d+(\.\d+)?) ?[KMGT]B", text, re.IGNORECASE)
    if size is None or not float(size[1]):
        raise typer.BadParameter(f"{text!r} is no size; write a number above 0 with KB, MB, GB or TB, as in 5GB")
    return text


Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Data type of the result; default: that of the source."),
]


def convert_import(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory.", metavar="HF_DIR", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Megatron checkpoint to write.", metavar="OUT", show_default=False)],
    overrides: Overrides = None,
    nproc: Nproc = None,
    dtype: Dtype = None,
) -> None:
    """Write a Hugging Face directory as a Megatron checkpoint, which runs of any layout can start from."""
    _with_huge_pages()
    with_errors(lambda: _import(source, target, overrides or [], nproc, dtype))


def convert_export(
    source: Annotated[Path, typer.Argument(help="Megatron checkpoint.", metavar="CKPT", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Hugging Face directory to write.", metavar="OUT", show_default=False)],
    overrides: Overrides = None,
    nproc: Nproc = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one safetensors file.", callback=_checked_size)
    ] = "5GB",
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory with config and tokenizer.")] = None,
) -> None:
    """Write a Megatron checkpoint, of `convert import` or a run's step_N, as a Hugging Face directory.

    The checkpoint may have been saved at any layout; no model is built. Several processes divide the files of the
    result among themselves. All overrides are checked; only those of the cluster's size and policy.model_name count.
    """
    _with_huge_pages()
    with_errors(lambda: _export(source, target, overrides or [], nproc, dtype, max_shard_size, model))


def _with_huge_pages() -> None:
    """Let torch use huge pages, which speeds up commands that mostly move tensors. Call it before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _import(source: Path, target: Path, overrides: list[str], nproc: int | None, dtype: str | None) -> None:
    from megatron_g2rpo.commands.convert.common import (
        check_target,
        precision_of,
        remove_on_failure,
        warn_without_tokenizer,
    )
    from megatron_g2rpo.commands.launch import is_launched, launch
    from megatron_g2rpo.weights import SafetensorsDirectory

    if not is_launched():
        check_target(target)
        warn_without_tokenizer(source)
    dtype = dtype or precision_of(SafetensorsDirectory(source).dtypes, source)
    recipe = policy_recipe([f"policy.model_name={source}", f"policy.precision={dtype}", *overrides], nproc)
    if prepare_processes(recipe):
        arguments = ["convert", "import", str(source), str(target), "--dtype", dtype, *overrides]
        with remove_on_failure(target):
            launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.commands.convert.import_hf import import_hf

    import_hf(recipe, target)
    if is_first():
        typer.echo(f"Megatron checkpoint: {target}")


def _export(
    source: Path,
    target: Path,
    overrides: list[str],
    nproc: int | None,
    dtype: str | None,
    max_shard_size: str,
    model: Path | None,
) -> None:
    from megatron_g2rpo.commands.convert.common import (
        check_target,
        precision_of,
        remove_on_failure,
        warn_without_tokenizer,
    )
    from megatron_g2rpo.commands.convert.export_hf import export, model_files
    from megatron_g2rpo.commands.launch import is_launched, launch
    from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint

    if not is_launched():
        check_target(target)
    checkpoint = MegatronCheckpoint(source)
    dtype = dtype or precision_of(checkpoint.dtypes, source)
    recipe = policy_recipe([f"policy.model_name={model_files(source, model)}", *overrides], nproc)
    directory = Path(recipe.policy.model_name)
    if not is_launched():
        warn_without_tokenizer(directory)
    if prepare_processes(recipe):
        options = ["--max-shard-size", max_shard_size, "--model", str(directory), "--dtype", dtype]
        with remove_on_failure(target):
            launch(recipe.cluster.gpus_per_node, ["convert", "export", str(source), str(target), *options, *overrides])
        return
    export(checkpoint, target, source=directory, dtype=dtype, max_shard_size=max_shard_size)
    if is_first():
        typer.echo(f"Hugging Face checkpoint: {target}")
