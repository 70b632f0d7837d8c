# SPDX-License-Identifier: Apache-2.0
"""The importer of this project's own field names, in a file of any kind that is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, refuse_video
from megatron_g2rpo.data.importers.values import images_of, is_missing, rest


def _matches(record: Mapping[str, Any]) -> bool:
    return "question" in record and bool({"answer", "response"} & record.keys())


@register("jsonl", matches=_matches)
def jsonl(source: Path, *, images: str | None = None, subset: str | None = None) -> Iterator[ImportedSample | Rejected]:
    """Read rows with the fields of a sample: JSON lines, as a rule.

    A row is ``{"task": ..., "question": ..., "answer": ..., "answer_format": ..., "images": [paths]}``, and may have a
    ``response`` and further fields.

    Args:
        source: what ``read_records`` reads.
        images: name of the field with the images; by default ``images`` or ``image``, and a row with neither has none.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """

    def convert(record: Record) -> ImportedSample:
        refuse_video(record)
        fields = record.fields
        names = ("images", "image") if images is None else (images,)
        shown = [fields[field] for field in names if not is_missing(fields.get(field)) and fields[field]]
        if len(shown) > 1:
            raise Refusal(record.name, "the fields 'images' and 'image' both hold images; name one (images=image)")
        pictures = [picture for value in shown for picture in images_of(value, record.name)]
        own = ("task", "question", "answer", "answer_format", "response")
        kept = {field: fields[field] for field in own if field in fields}
        return ImportedSample(
            name=record.name, fields=rest(fields, (*own, *names, "images")) | kept, images=pictures, record=fields
        )

    return each(source, subset, convert)
