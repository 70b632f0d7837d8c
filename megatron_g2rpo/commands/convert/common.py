# SPDX-License-Identifier: Apache-2.0
"""What both directions of ``megatron-g2rpo convert`` share: checks before processes start, a progress bar."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.types import DTYPES
from megatron_g2rpo.weights import CheckpointError, Owner, partial_path
from megatron_g2rpo.weights.checkpoint_metadata import COMMON, METADATA, TENSORS
from megatron_g2rpo.weights.manifest import MANIFEST
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES
from megatron_g2rpo.weights.model_files import TOKENIZERS, has_tokenizer

# What a Megatron checkpoint consists of.
_CHECKPOINT = ("*.distcp", TENSORS, TENSORS + ".tmp", METADATA, COMMON, MANIFEST, MODEL_FILES)


def check_target(target: Path) -> None:
    """Refuse a target that exists; a symlink does, wherever it points.

    Where it is written first, only what a conversion left there that was killed may be, and is removed.

    Raises:
        FileExistsError: naming it.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already; choose another place, or remove it first")
    if not _is_unfinished_checkpoint(partial_path(target)):
        Owner().check(target)


def _is_unfinished_checkpoint(partial: Path) -> bool:
    """Whether a directory holds nothing but what an import, which has no marker, writes."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return all(any(path.match(pattern) for pattern in _CHECKPOINT) for path in partial.iterdir())


def warn_without_tokenizer(directory: Path) -> None:
    """Say on stderr that a directory, which is converted all the same, has no tokenizer."""
    if not has_tokenizer(directory):
        typer.echo(
            f"warning: {directory} has no tokenizer (none of {', '.join(TOKENIZERS)}), and neither has the result: "
            "before it can be trained or served, copy tokenizer.json, tokenizer_config.json and chat_template.jinja "
            "there",
            err=True,
        )


def precision_of(dtypes: set[torch.dtype], where: Path) -> str:
    """The one dtype of some weights, as ``policy.precision`` calls it.

    Raises:
        CheckpointError: there are several, or it is none that the policy has.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if len(dtypes) != 1 or not dtypes <= names.keys():
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"{where}: its weights are {found}; choose one of {', '.join(DTYPES)} with --dtype")
    return names[next(iter(dtypes))]


@contextmanager
def progress_bar(label: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields what is told of bytes that were moved."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not show) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def remove_on_failure(target: Path) -> Iterator[None]:
    """Remove what has been written for ``target`` when it is not completed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial_path(target), ignore_errors=True)
        raise
