# SPDX-License-Identifier: Apache-2.0
"""Rows of files as people have them: JSON, JSON lines, CSV, Parquet, Hugging Face datasets, webdataset tars.

Rows are read one after the other, whatever the size of the source, and nothing is fetched over the network. Their names
are ``file:row``, counted from 1; of JSON lines and CSV the row is the line where it begins.

JSON and CSV are read row by row, and not as columns of one type each, which the ``datasets`` library makes of them: a
file in which an answer is a number here and a text there is common, one faulty row costs that row alone, and the text
``01`` of a CSV file stays what it is.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers import tables, tars
from megatron_g2rpo.data.importers.base import Refusal, Rejected
from megatron_g2rpo.data.importers.values import Broken
from megatron_g2rpo.data.shard_format import INDEX_NAME
from megatron_g2rpo.data.tar_members import tars_of

JSON_LINES = (".jsonl", ".ndjson")
CSV = {".csv": ",", ".tsv": "\t"}
REJECTED = ".rejected.jsonl"  # ends the name of an import's list of what it could not use
FILES = (".json", *JSON_LINES, *CSV, ".parquet", ".tar")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row: its name, ``file:row``, and its fields."""

    name: str
    fields: Mapping[str, Any]


def read_records(source: Path, subset: str | None = None) -> Iterator[Record | Rejected]:
    """Read the rows of a source; a row that is no object is yielded as rejected.

    Args:
        source: a ``.json`` (a list, or lines), ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.tar`` file; a folder
            of ``.tar`` files; a folder that ``datasets.save_to_disk`` wrote or ``datasets.load_dataset`` reads; or a
            folder with one file of the kinds above at its top. ``FOLDER@SPLIT`` names a split of a dataset.
        subset: name of the dataset's configuration, where it has several.

    Raises:
        DataError: there is no such source, it is of no kind that is read, or it cannot be read to its end.
    """
    path, split = _split_of(source)
    if path.is_dir():
        file = None if split or subset else _only_file(path)
        if file is None:
            yield from _named(path if split is None else source, _rows_of_folder(path, subset, split))
            return
        path = file
    elif split is not None or subset is not None:
        raise DataError(f"{path} is a file: a split (@{split or '...'}) or subset is a part of a dataset's folder")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no kind that is read; convert it to one of {', '.join(FILES)}")
    try:
        yield from _named(path, reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def image_directory(source: Path) -> Path:
    """Return the directory that the image paths of a source are relative to: a folder itself, or that of a file."""
    folder = source.with_name(source.name.rpartition("@")[0] or source.name)
    return next((path for path in (source, folder) if path.is_dir()), source.parent)


def _named(path: Path, rows: Iterator[tuple[object, Any]]) -> Iterator[Record | Rejected]:
    for row, fields in rows:
        name = f"{path}:{row}"
        if not isinstance(fields, Mapping | Broken):
            fields = Broken("a row must be a JSON object", type(fields).__name__)
        if isinstance(fields, Broken):
            yield Rejected.by(Refusal(name, *fields), name)
        else:
            yield Record(name=name, fields=fields)


def _split_of(source: Path) -> tuple[Path, str | None]:
    if source.exists():
        return source, None
    name, at, split = source.name.rpartition("@")
    if at and (path := source.with_name(name)).exists():
        return path, split
    raise DataError(f"{source} does not exist; name a file or folder of this machine")


def _only_file(folder: Path) -> Path | None:
    """Return the one file of rows at the top of a folder; None where it is a dataset as a whole."""
    if tables.is_dataset(folder):
        return None
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FILES and path.name[0] not in "._" and not path.name.endswith(REJECTED)
    )
    if all(path.suffix == ".tar" or path.name == INDEX_NAME for path in files):
        return None
    if len(files) > 1:
        some = ", ".join(path.name for path in files[:5])
        raise DataError(f"{folder} holds {len(files)} files of rows ({some} ...); name one of them")
    return files[0]


def _rows_of_folder(folder: Path, subset: str | None, split: str | None) -> Iterator[tuple[object, Any]]:
    shards = tars_of(folder)
    if not shards:
        yield from tables.rows_of_dataset(folder, subset, split)
        return
    if subset is not None or split is not None:
        raise DataError(f"{folder} holds tar files, which have no splits or subsets")
    for shard in shards:
        for row, fields in tars.rows_of(shard):
            yield f"{shard.name}:{row}", fields


def _rows_of_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a list, or of lines: both are called ``.json``."""
    with path.open(encoding="utf-8-sig") as file:
        while (first := file.read(1)).isspace():
            pass
        if first == "[":
            yield from _rows_of_list(path, file)
            return
        if first == "{" and _is_cut_off(first + file.readline()) and file.readline().lstrip()[:1] != "{":
            raise DataError(
                f"{path} is one JSON object over several lines, and no rows: write the list of rows alone, which is "
                "perhaps one of its fields, or one row a line"
            )
    yield from _rows_of_lines(path)


def _is_cut_off(line: str) -> bool:
    """Whether a line is the beginning of a JSON value that goes on in the next."""
    try:
        _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) and line.endswith("\n")
    except (ValueError, RecursionError):
        pass
    return False


def _rows_of_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, _DECODER.decode(line)
                except (ValueError, RecursionError) as error:
                    yield number, Broken("not valid JSON", error)


def _rows_of_list(path: Path, file: TextIO, chunk: int = 1 << 20) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, whose opening bracket has been read; no more of the file is held than a row needs."""
    text, at, row, is_last = "", 0, 0, False

    def more() -> bool:
        nonlocal text, at, is_last
        # As much again as is held: a value that is longer than all read so far is parsed anew only log(length) times.
        read = "" if is_last else file.read(max(chunk, len(text) - at))
        text, at, is_last = text[at:] + read, 0, not read
        return not is_last

    def skip(characters: str) -> str:
        nonlocal at
        while True:
            while at < len(text) and text[at] in characters:
                at += 1
            if at < len(text) or not more():
                return text[at : at + 1]

    while (next_one := skip(" \t\r\n")) != "]":
        if row:
            if next_one != ",":
                raise DataError(f"{path}: after row {row}: a comma or the closing bracket of the list is missing")
            at += 1
            skip(" \t\r\n")
        while True:
            try:
                value, end = _DECODER.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not more():
                    raise DataError(f"{path}: row {row + 1}: not valid JSON ({error})") from error
                continue
            if end == len(text) and more():  # a number may go on
                continue
            break
        at, row = end, row + 1
        yield row, value
    at += 1
    if skip(" \t\r\n"):
        raise DataError(f"{path}: after row {row}: the list is closed, and more follows; write one list, or JSON lines")


def _rows_of_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=CSV[path.suffix.lower()], strict=True)
        line = 2
        try:  # a column without a name is the index that pandas writes
            repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]
            if repeated:
                raise DataError(f"{path}: the header has {repeated[0]!r} twice; give each column a name of its own")
            for fields in reader:
                if None in fields or None in fields.values():
                    yield line, Broken("more or fewer fields than the header has", f"{len(fields)} names")
                else:
                    yield line, {key: value for key, value in fields.items() if key and value != ""}
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _without_nan(text: str) -> float | None:
    """Return what a word that JSON does not know stands for; pandas writes NaN where a value is missing."""
    return None if text == "NaN" else math.copysign(math.inf, -1 if text.startswith("-") else 1)


_DECODER = json.JSONDecoder(parse_constant=_without_nan)
_READERS: dict[str, Callable[[Path], Iterator[tuple[Any, Any]]]] = {
    ".json": _rows_of_json,
    **dict.fromkeys(JSON_LINES, _rows_of_lines),
    **dict.fromkeys(CSV, _rows_of_csv),
    ".parquet": tables.rows_of_parquet,
    ".tar": tars.rows_of,
}
