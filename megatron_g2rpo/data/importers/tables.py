# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet files and local Hugging Face datasets, read with the ``datasets`` library, as a stream.

Images are not decoded: their encoded bytes, or their paths, go into the shards unchanged.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.errors import DataError

_SAVED = ("dataset_info.json", "dataset_dict.json")
_TABLES = (".parquet", ".arrow")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset as a whole: saved to disk, or with tables or a dataset card."""
    if any((folder / name).exists() for name in _SAVED):
        return True
    return any(path.suffix in _TABLES for path in (*folder.glob("*"), *folder.glob("*/*")))


def rows_of_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one file, from 1 on.

    Raises:
        DataError: it cannot be read.
    """
    library = _library()
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = library.load_dataset(
                "parquet", data_files=str(path.absolute()), split="train", streaming=True, cache_dir=cache
            )
            yield from enumerate(_named_classes(rows), start=1)
        except _errors(library) as error:
            raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def rows_of_dataset(folder: Path, subset: str | None, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one split of a dataset's folder, from 1 on.

    Raises:
        DataError: it is no dataset, cannot be read, or has several splits and none, or a wrong one, is named.
    """
    library = _library()
    with tempfile.TemporaryDirectory() as cache:
        try:
            if any((folder / name).exists() for name in _SAVED):
                if subset is not None:
                    raise DataError(f"{folder} was saved to disk, and has no subsets")
                found: Any = library.load_from_disk(str(folder))
            else:
                found = library.load_dataset(str(folder.absolute()), name=subset, streaming=True, cache_dir=cache)
            chosen = _chosen(found, folder, split)
            if isinstance(chosen, library.Dataset):
                chosen = chosen.to_iterable_dataset()
            yield from enumerate(_named_classes(chosen), start=1)
        except DataError:
            raise
        except _errors(library) as error:
            raise DataError(f"{folder} cannot be read as a dataset: {_first_line(error)}") from error


def _chosen(found: Any, folder: Path, split: str | None) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise DataError(f"{folder} has no splits; name it without @{split}")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        choices = ", ".join(f"{folder}@{name}" for name in found)
        raise DataError(f"{folder} has {'several splits' if split is None else f'no split {split!r}'}; name {choices}")
    return found[split]


def _named_classes(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield rows with the names of classes, where the library keeps numbers: nobody answers with a class's number."""
    from datasets import ClassLabel

    classes = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, ClassLabel)}
    for row in rows.decode(False):
        # -1 is how the library writes that a row has no class.
        names = {name: None if row[name] in (None, -1) else kind.int2str(row[name]) for name, kind in classes.items()}
        yield {**row, **names}


def _library() -> Any:
    """Return the ``datasets`` library with the network shut, whether or not it was imported before."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    library: Any = datasets  # its stubs know no `config`
    library.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    return library


def _errors(library: Any) -> tuple[type[Exception], ...]:
    # pyarrow's errors are ValueErrors, TypeErrors, KeyErrors, or these of its own.
    import pyarrow

    return (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException, library.exceptions.DatasetsError)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
