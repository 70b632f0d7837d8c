# SPDX-License-Identifier: Apache-2.0
"""The samples that an importer yields, and how a dataset is written from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.fields import REQUIRED_FIELDS
from megatron_g2rpo.data.shard_writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class ImportedSample:
    """One sample of a dataset of another format, with the fields that a shard holds.

    Attributes:
        name: name of the sample in error messages, such as a file and a line.
        fields: ``task``, ``question``, ``answer`` and ``answer_format`` as text; all other fields are kept, too.
        images: encoded image files (PNG, JPEG or WebP), in the order in which they are shown.
    """

    name: str
    fields: Mapping[str, Any]
    images: Sequence[bytes] = ()


# Takes the source, and its options as keyword-only parameters.
Importer = Callable[..., Iterator[ImportedSample]]

register = registry.importers.register


def import_dataset(importer: Callable[[Path], Iterator[ImportedSample]], source: Path, target: Path) -> int:
    """Write a dataset of another format as shards with an index.

    Args:
        importer: an importer with its options filled in.
        source: path that the importer reads.
        target: directory for the shards; must not exist. It appears whole or not at all.

    Returns:
        The number of samples.

    Raises:
        SampleError: a sample lacks a field, has a field that is not text, or an image of an unknown format; the message
            names the sample.
        DataError: the target exists, or the source has no sample.
    """
    if target.exists():
        raise DataError(f"{target} exists already; choose another place, or remove it first")
    partial, count = target.with_name(f"{target.name}.partial"), 0
    shutil.rmtree(partial, ignore_errors=True)  # what an import that was killed had begun
    try:
        with ShardWriter(partial) as writer:
            for sample in importer(source):
                _check(sample)
                suffixes = [_suffix(image, sample.name) for image in sample.images]
                writer.write(f"{count:08d}", sample.fields, sample.images, suffixes)
                count += 1
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return count


def _check(sample: ImportedSample) -> None:
    for name in REQUIRED_FIELDS:
        value = sample.fields.get(name)
        if not isinstance(value, str) or not value:
            got = f"got {value!r}" if name in sample.fields else "and is missing"
            hint = "; write numbers in quotes" if isinstance(value, int | float) else ""
            raise SampleError(f"{sample.name}: the field {name!r} must be text that is not empty, {got}{hint}")


def _suffix(image: bytes, name: str) -> str:
    """Return the file suffix of an encoded image, recognised by its first bytes."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise SampleError(f"{name}: an image is neither PNG, JPEG nor WebP; convert it first")
