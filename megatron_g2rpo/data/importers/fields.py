# SPDX-License-Identifier: Apache-2.0
"""The importer of rows whose fields are named on the command line: ``--map question=problem``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers.base import ImportedSample, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video, without_tags
from megatron_g2rpo.data.importers.values import images_of, lookup, rest

_OPTIONAL = ("images", "response", "task", "answer_format")


@register("fields")
def fields(
    source: Path, *, map: tuple[str, ...] = (), subset: str | None = None
) -> Iterator[ImportedSample | Rejected]:
    """Read rows whose fields have names of any kind.

    Args:
        source: what ``read_records`` reads.
        map: ``FIELD=PATH`` each: where a field of the sample stands in the row, a dotted path that reaches into objects
            and lists, ``answer=reward_model.ground_truth``. A field that is not named is where its own name says;
            fields of the sample's that do not exist here become further fields of it.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read, or an entry of ``map`` is not ``FIELD=PATH``, or its field is named twice.
    """
    paths = {"question": "question", "answer": "answer"}
    given = _parsed(map)
    paths |= given

    def convert(record: Record) -> ImportedSample:
        refuse_video(record)
        read = {field: needed(record, path) for field, path in paths.items() if field not in _OPTIONAL}
        for field in ("response", "task", "answer_format"):
            value = lookup(record.fields, paths.get(field, field))
            if value is not None:
                read[field] = value
        read["answer"] = without_tags(read["answer"], record.name)
        pictures = images_of(lookup(record.fields, paths.get("images", "images")), record.name)
        used = {*paths.values(), *read, "images"}
        return ImportedSample(
            name=record.name, fields=rest(record.fields, used) | read, images=pictures, record=record.fields
        )

    return each(source, subset, convert)


def _parsed(entries: tuple[str, ...]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for entry in entries:
        field, _, path = entry.partition("=")
        if not field or not path:
            raise DataError(f"--map {entry}: write FIELD=PATH, such as question=problem")
        if field in paths:
            raise DataError(f"--map {entry}: {field!r} is already {paths[field]!r}")
        paths[field] = path
    return paths
