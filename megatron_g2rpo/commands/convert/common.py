# SPDX-License-Identifier: Apache-2.0
"""What both directions of ``megatron-g2rpo convert`` share: checks before processes start, a progress bar."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_g2rpo.types import DTYPES
from megatron_g2rpo.weights import CheckpointError, partial_path


def check_target(target: Path) -> None:
    """Refuse a target that exists.

    Raises:
        FileExistsError: naming it.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another place, or remove it first")


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
