# SPDX-License-Identifier: Apache-2.0
"""What an importer gives, and how a dataset is written from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.shard_format import REQUIRED_FIELDS
from megatron_g2rpo.data.shard_writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class ImportedSample:
    """One sample of a foreign dataset, as a shard holds it.

    Attributes:
        name: what errors call it, such as a file and a line.
        fields: ``task``, ``question``, ``answer`` and ``answer_format`` as text; all others are kept beside them.
        images: encoded image files (PNG, JPEG or WebP), in the order in which they are shown.
    """

    name: str
    fields: Mapping[str, Any]
    images: Sequence[bytes] = ()


# Takes the source, and its options as keyword-only parameters.
Importer = Callable[..., Iterator[ImportedSample]]

register = registry.importers.register


def import_dataset(importer: Callable[[Path], Iterator[ImportedSample]], source: Path, target: Path) -> int:
    """Write a foreign dataset as shards with an index.

    Args:
        importer: with its options filled in.
        source: what it reads.
        target: directory for the shards; must not hold any.

    Returns:
        The number of samples.

    Raises:
        SampleError: a sample lacks a field, has one that is no text, or an image of another format; it is named.
        DataError: the target holds shards, or the source has no sample.
    """
    count = 0
    with ShardWriter(target) as writer:
        for sample in importer(source):
            _check(sample)
            suffixes = [_suffix(image, sample.name) for image in sample.images]
            writer.write(f"{count:08d}", sample.fields, sample.images, suffixes)
            count += 1
    return count


def _check(sample: ImportedSample) -> None:
    for name in REQUIRED_FIELDS:
        if name == "images":
            continue
        value = sample.fields.get(name)
        if not isinstance(value, str) or not value:
            raise SampleError(f"{sample.name}: the field {name!r} must be text that is not empty, got {value!r}")


def _suffix(image: bytes, name: str) -> str:
    """File suffix of an encoded image, by its first bytes."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise SampleError(f"{name}: an image is neither PNG, JPEG nor WebP; convert it first")
