# SPDX-License-Identifier: Apache-2.0
"""The importer of the paper's data: OpenVLThinkerV2's files, and OneThinker's, whose rows they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video, without_tags
from megatron_g2rpo.data.importers.values import images_of, is_missing, lookup

# Problem types whose references hold boxes, and points, in thousandths of the image's width and height.
_RELATIVE = frozenset({"spatial grounding", "spatial-temporal grounding", "tracking", "segmentation"})
_KEPT = ("problem_id", "data_source", "problem_type", "options")


def _matches(record: Mapping[str, Any]) -> bool:
    return {"problem", "answer", "problem_type"} <= record.keys()


@register("openvlthinker", matches=_matches)
def openvlthinker(source: Path, *, subset: str | None = None) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{problem, options, answer, problem_type, task_type, images}``.

    The problem type is the answer format, by the same name, and the task type is the task; OneThinker's rows have no
    task type, and their problem type is the task. The options of a multiple choice follow the question, a line each,
    unless it has them already. Boxes and points are marked as relative, ``box_frame``. Rows of videos are rejected.

    Args:
        source: what ``read_records`` reads.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """
    return each(source, subset, _sample)


def _sample(record: Record) -> ImportedSample:
    refuse_video(record)
    kind = needed(record, "problem_type")
    question = needed(record, "problem")
    options = lookup(record.fields, "options") or []
    if not isinstance(options, list):
        raise Refusal(record.name, "field 'options' is no list", repr(options)[:80])
    if isinstance(question, str) and not all(str(option) in question for option in options):
        question = "\n".join([question, "Options:", *map(str, options)])
    fields = {field: record.fields[field] for field in _KEPT if not is_missing(record.fields.get(field))}
    if not options:
        fields.pop("options", None)
    if kind in _RELATIVE:
        fields["box_frame"] = "relative"
    fields |= {
        "task": lookup(record.fields, "task_type") or kind,
        "question": question,
        "answer": without_tags(needed(record, "answer"), record.name),
        "answer_format": kind,
    }
    pictures = images_of(lookup(record.fields, "images"), record.name)
    return ImportedSample(name=record.name, fields=fields, images=pictures, record=record.fields)
