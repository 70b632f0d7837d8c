# SPDX-License-Identifier: Apache-2.0
"""The importer of EasyR1's datasets, such as geometry3k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video
from megatron_g2rpo.data.importers.values import images_of, lookup, rest


def _matches(record: Mapping[str, Any]) -> bool:
    return {"problem", "answer"} <= record.keys() and "problem_type" not in record


@register("easyr1", matches=_matches)
def easyr1(source: Path, *, subset: str | None = None) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{problem, answer, images}``; all other fields are kept.

    They name neither task nor answer format: ``--task`` and ``--answer-format`` do.

    Args:
        source: what ``read_records`` reads, Parquet as a rule.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """
    return each(source, subset, _sample)


def _sample(record: Record) -> ImportedSample:
    refuse_video(record)
    fields = rest(record.fields, ("problem", "answer", "images"))
    fields |= {"question": needed(record, "problem"), "answer": needed(record, "answer")}
    pictures = images_of(lookup(record.fields, "images"), record.name)
    return ImportedSample(name=record.name, fields=fields, images=pictures, record=record.fields)
