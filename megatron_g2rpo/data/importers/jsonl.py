# SPDX-License-Identifier: Apache-2.0
"""JSON lines whose objects have this project's field names, and images as files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.importers.base import ImportedSample, register


@register("jsonl")
def jsonl(source: Path, *, images: str = "images") -> Iterator[ImportedSample]:
    """One sample a line: ``{"task": ..., "question": ..., "answer": ..., "answer_format": ..., "images": [paths]}``.

    Args:
        source: the file; paths of images are relative to its directory.
        images: name of the field that lists them; a sample without it has none.

    Raises:
        DataError: the file can't be read.
        SampleError: a line that is no JSON object, or an image that can't be read; names file and line.
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
        try:
            encoded = [(source.parent / path).read_bytes() for path in paths]
        except (OSError, TypeError) as error:
            raise SampleError(f"{name}: field {images!r} must list image files: {error}") from error
        yield ImportedSample(name=name, fields=fields, images=encoded)
