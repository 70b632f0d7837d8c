# SPDX-License-Identifier: Apache-2.0
"""The importer of JSON lines: objects with this project's field names, and images as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.importers.base import ImportedSample, register


@register("jsonl")
def jsonl(source: Path, *, images: str = "images") -> Iterator[ImportedSample]:
    """Read JSON lines with one sample each.

    A line is ``{"task": ..., "question": ..., "answer": ..., "answer_format": ..., "images": [paths]}``.

    Args:
        source: the file to read; paths of images are relative to its directory.
        images: name of the field that lists the images; a sample without this field has no image.

    Raises:
        DataError: the file cannot be read.
        SampleError: a line is not a JSON object, or an image cannot be read; the message names file and line.
    """
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{source}:{number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise SampleError(f"{name}: not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise SampleError(f"{name}: a line must be a JSON object, not {type(fields).__name__}")
        paths = fields.pop(images, [])
        if not isinstance(paths, list):
            raise SampleError(f"{name}: field {images!r} must be a list of image files, got {paths!r}")
        if not paths and "image" in fields:
            raise SampleError(f"{name}: there is a field 'image', but images are listed in {images!r}: [\"file.png\"]")
        try:
            encoded = [(source.parent / path).read_bytes() for path in paths]
        except (OSError, TypeError) as error:
            raise SampleError(f"{name}: field {images!r} must list image files: {error}") from error
        yield ImportedSample(name=name, fields=fields, images=encoded)
