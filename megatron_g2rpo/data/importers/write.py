# SPDX-License-Identifier: Apache-2.0
"""A dataset of another format, written as shards: whole or not at all, with a list of what could not be imported."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.fields import checked_fields
from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected
from megatron_g2rpo.data.importers.load import Loaded, Waiting, load_all
from megatron_g2rpo.data.importers.records import REJECTED, image_directory
from megatron_g2rpo.data.importers.split import validation_samples
from megatron_g2rpo.data.importers.values import lookup
from megatron_g2rpo.data.shard_format import INDEX_NAME
from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.tasks.prompts import IMAGE_TAG

TRAIN, VALIDATION = "train", "val"
_SPOOL = "spool"
# What is written before a dataset is whole.
_WRITTEN = ("shard-*.tar", INDEX_NAME, "index.tmp", _SPOOL)
_FIELD = re.compile(r"field '([^']+)'")


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """How a dataset is imported, whatever its importer.

    Attributes:
        task: task of all samples; None for what the data says.
        task_field: dotted path of the field that names the task.
        answer_format: answer format of all samples; None for what the data says.
        answer_format_field: dotted path of the field that names the answer format.
        image_dir: directory that paths of images are relative to; None for that of the source.
        workers: number of processes that read image files.
        decode: whether every image is decoded, so that a damaged one is rejected.
        validation_share: expected share of a validation part, by image; None for no such part.
        limit: number of rows that are read, from the first; None for all.
        samples_per_shard: number of samples after which a new shard begins.
        strict: whether the first row that cannot be imported is an error.
    """

    task: str | None = None
    task_field: str | None = None
    answer_format: str | None = None
    answer_format_field: str | None = None
    image_dir: Path | None = None
    workers: int = 1
    decode: bool = True
    validation_share: float | None = None
    limit: int | None = None
    samples_per_shard: int = 8192
    strict: bool = False

    def check(self) -> None:
        """Raise DataError where settings exclude each other, or name what there is not."""
        for constant, column in (("task", "task_field"), ("answer_format", "answer_format_field")):
            if getattr(self, constant) is not None and getattr(self, column) is not None:
                flags = [f"--{name.replace('_', '-')}" for name in (constant, column)]
                raise DataError(f"{flags[0]} and {flags[1]} say the same: give one of them")
        if self.answer_format is not None and self.answer_format not in registry.answer_formats:
            raise DataError(f"--answer-format: {registry.answer_formats.unknown(self.answer_format)}")
        if self.image_dir is not None and not self.image_dir.is_dir():
            raise DataError(f"--image-dir: {self.image_dir} is no directory")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise DataError(f"--split must be between 0 and 1, such as 0.02, not {self.validation_share}")


@dataclass(kw_only=True)
class ImportResult:
    """What an import has written.

    Attributes:
        samples: number of samples by (part, task, answer format); the part is empty without a validation part.
        images: number of images, each as often as a sample shows it.
        rejected: number of rows that were not imported, by reason.
        first_rejected: the message of the first such row, by reason.
        rejected_file: JSON lines ``{name, reason, message}`` of these rows; None if there are none.
    """

    samples: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: dict[str, str] = field(default_factory=dict)
    rejected_file: Path | None = None


def import_dataset(
    importer: Callable[[Path], Iterator[ImportedSample | Rejected]],
    source: Path,
    target: Path,
    settings: ImportSettings | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> ImportResult:
    """Write a dataset of another format as shards with an index.

    Rows that cannot be imported are listed in ``<target>.rejected.jsonl``. The samples are written as they are read:
    memory holds the index of what was written, and the samples in work.

    Args:
        importer: an importer with its options filled in.
        source: path that the importer reads.
        target: directory for the shards, or for two such, ``train`` and ``val``, with a validation part; must not
            exist. It appears whole or not at all.
        settings: see ``ImportSettings``.
        on_row: called after every row, for a progress bar.

    Raises:
        SampleError: a row cannot be imported, under ``strict``; or the importer raises it.
        DataError: settings are wrong, the target exists, the source cannot be read, or nothing of it can be imported.
    """
    settings = settings or ImportSettings()
    settings.check()
    if target.exists():
        raise DataError(f"{target} exists already; choose another place, or remove it first")
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
    listed = target.with_name(f"{target.name}{REJECTED}")
    partial, partial_list = (path.with_name(f"{path.name}.partial") for path in (target, listed))
    _remove_unfinished(partial)
    result = ImportResult()
    try:
        partial.mkdir()
        with partial_list.open("w", encoding="utf-8") as file:
            loaded = load_all(
                _waiting(importer(source), source, settings),
                workers=settings.workers,
                decode=settings.decode,
                digests=settings.validation_share is not None,
            )
            _write(_accepted(loaded, result, file.write, settings.strict, on_row), partial, result, settings)
        listed.unlink(missing_ok=True)
        if result.rejected:
            result.rejected_file = partial_list.rename(listed)
        _check_something(result, source)
        if settings.image_dir is not None and not result.images:
            raise DataError(
                f"--image-dir {settings.image_dir} is given, but no row of {source} names an image; say where they do, "
                "with --map images=FIELD, or leave --image-dir out"
            )
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial_list.unlink(missing_ok=True)
    return result


def _check_something(result: ImportResult, source: Path) -> None:
    if result.samples:
        return
    if not result.rejected:
        raise DataError(f"{source} holds no samples")
    reasons = "".join(
        f"\n  {count} x {reason}, the first: {result.first_rejected[reason]}"
        for reason, count in result.rejected.most_common()
    )
    raise DataError(f"{source}: nothing could be imported; {result.rejected_file} lists the rows{reasons}")


def _waiting(
    rows: Iterator[ImportedSample | Rejected], source: Path, settings: ImportSettings
) -> Iterator[Waiting | Rejected]:
    """Check the fields of samples, and find where their images are."""
    folder = settings.image_dir or image_directory(source)
    known = frozenset(registry.answer_formats.names())
    for row in islice(rows, settings.limit):
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            fields = _fields(row, settings, known)
            images = tuple(folder / image if isinstance(image, Path) else image for image in row.images)
            _check_places(row.name, fields["question"], len(images))
        except SampleError as error:
            place = _FIELD.search(str(error))
            about = f"field {place[1]!r} is missing or cannot be used" if place else "fields cannot be used"
            yield Rejected.by(error, row.name, about)
            continue
        yield Waiting(name=row.name, fields=fields, images=images)


def _fields(row: ImportedSample, settings: ImportSettings, known: frozenset[str]) -> dict[str, Any]:
    record = row.fields if row.record is None else row.record
    fields: dict[str, Any] = dict(row.fields)
    fields.pop("images", None)
    for name in ("task", "answer_format"):
        constant, path = getattr(settings, name), getattr(settings, f"{name}_field")
        if constant is not None:
            fields[name] = constant
        elif path is not None:
            fields[name] = lookup(record, path)
        if fields.get(name) is None:
            flag = f"--{name.replace('_', '-')}"
            where = f"no {name.replace('_', ' ')} in field {path!r}" if path else f"no {name.replace('_', ' ')}"
            raise Refusal(row.name, f"{where}; give {flag} NAME, or {flag}-field FIELD")
    checked = checked_fields(fields, row.name)
    checked.pop("images", None)  # the writer names them
    if checked["answer_format"] not in known:
        reason, _, formats = registry.answer_formats.unknown(checked["answer_format"]).partition("; ")
        raise Refusal(row.name, reason, formats)
    return checked


def _check_places(name: str, question: str, images: int) -> None:
    places = question.count(IMAGE_TAG)
    if places and places != images:
        raise Refusal(name, f"the question's tags {IMAGE_TAG} are not as many as its images", f"{places} and {images}")


def _accepted(
    rows: Iterator[Loaded | Rejected],
    result: ImportResult,
    write: Callable[[str], object],
    strict: bool,
    on_row: Callable[[], None],
) -> Iterator[Loaded]:
    """Pass samples on; count and list what was rejected."""
    for row in rows:
        on_row()
        if isinstance(row, Loaded):
            result.images += len(row.images)
            yield row
            continue
        if strict:
            raise SampleError(row.message)
        result.rejected[row.reason] += 1
        result.first_rejected.setdefault(row.reason, row.message)
        # A half surrogate in a message cannot be written as UTF-8; as an escape of JSON it can.
        write(json.dumps({"name": row.name, "reason": row.reason, "message": row.message}) + "\n")


def _remove_unfinished(partial: Path) -> None:
    """Remove what an import that was killed had begun, and nothing else.

    Raises:
        DataError: what is there is something else.
    """
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir() or not all(map(_is_of_import, partial.rglob("*"))):
        raise DataError(f"{partial} is in the way, where shards are written first; move it elsewhere, or remove it")
    shutil.rmtree(partial)


def _is_of_import(path: Path) -> bool:
    if path.is_dir():
        return path.name in (TRAIN, VALIDATION)
    return any(path.match(pattern) for pattern in _WRITTEN)


def _write(samples: Iterator[Loaded], partial: Path, result: ImportResult, settings: ImportSettings) -> None:
    if settings.validation_share is None:
        _write_parts(((sample, "") for sample in samples), partial, result, settings)
        return
    # A sample's part depends on all that it shares an image with, so that the first pass over the images writes them
    # to one file, and a second pass divides that.
    spool, contents = partial / _SPOOL, []
    with spool.open("wb") as file:
        for sample in samples:
            contents.append(sample.contents)
            pickle.dump(sample, file, pickle.HIGHEST_PROTOCOL)
    if contents:
        held_out = validation_samples(contents, settings.validation_share)
        with spool.open("rb") as file:
            parts = ((pickle.load(file), VALIDATION if held else TRAIN) for held in held_out)
            _write_parts(parts, partial, result, settings)
    spool.unlink()


def _write_parts(
    samples: Iterator[tuple[Loaded, str]], partial: Path, result: ImportResult, settings: ImportSettings
) -> None:
    """Write samples to the shards of their parts, whose keys are numbers from 0."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for sample, part in samples:
            if part not in writers:
                writers[part] = stack.enter_context(ShardWriter(partial / part, settings.samples_per_shard))
            writers[part].write(f"{counts[part]:08d}", sample.fields, sample.images, sample.suffixes)
            counts[part] += 1
            result.samples[part, str(sample.fields["task"]), str(sample.fields["answer_format"])] += 1
