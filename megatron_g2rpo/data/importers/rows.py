# SPDX-License-Identifier: Apache-2.0
"""What the importers of rows have in common: each makes one sample of one row, or says why it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected
from megatron_g2rpo.data.importers.records import Record, read_records
from megatron_g2rpo.data.importers.values import is_missing, lookup

_VIDEOS = ("videos", "video")


def each(
    source: Path, subset: str | None, convert: Callable[[Record], ImportedSample]
) -> Iterator[ImportedSample | Rejected]:
    """Convert the rows of a source; one for which ``convert`` raises SampleError is yielded as rejected.

    Raises:
        DataError: the source cannot be read, see ``read_records``.
    """
    for record in read_records(source, subset):
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            yield convert(record)
        except SampleError as error:
            yield Rejected.by(error, record.name)
        except RecursionError:
            yield Rejected.by(Refusal(record.name, "values are nested too deep"), record.name)


def needed(record: Record, path: str) -> Any:
    """Return the value at a dotted path.

    Raises:
        Refusal: it is missing or null.
    """
    value = lookup(record.fields, path)
    if is_missing(value):
        raise Refusal(record.name, f"no field {path!r}", f"it has {', '.join(map(str, record.fields))}")
    return value


def refuse_video(record: Record) -> None:
    """Refuse a row that shows a video.

    Raises:
        Refusal: it does.
    """
    if record.fields.get("data_type") == "video" or any(record.fields.get(field) for field in _VIDEOS):
        raise Refusal(record.name, "video is not supported")


def without_tags(answer: Any, name: str) -> Any:
    """Return what stands between ``<answer>`` and ``</answer>``; an answer without the tags as it is.

    Raises:
        Refusal: the tags are not one pair around the whole.
    """
    if not isinstance(answer, str) or not re.search("</?answer>", answer):
        return answer
    inner = re.fullmatch(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", answer, re.DOTALL)
    if inner is None:
        raise Refusal(name, "the tags <answer> and </answer> are not one pair around the reference", answer[:80])
    return inner[1].strip()
