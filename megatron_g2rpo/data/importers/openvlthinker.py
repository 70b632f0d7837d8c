# SPDX-License-Identifier: Apache-2.0
"""The importer of the paper's data: OpenVLThinkerV2's files, and OneThinker's, whose rows they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video, without_tags
from megatron_g2rpo.data.importers.values import images_of, is_missing, lookup

# Problem types whose references hold boxes, and points, in thousandths of the image's width and height.
_RELATIVE = frozenset({"spatial grounding", "spatial-temporal grounding", "tracking", "segmentation"})
# What the question does not say: in which form the answer is compared. The paper's code ends prompts with a sentence
# for each problem type, too; these are ours.
_THOUSANDTHS = "in thousandths of the image's width and height, 0 to 1000"
_FORMS = {
    "multiple choice": "Answer with the letter of the right option.",
    "numerical": "Answer with a number.",
    "regression": "Answer with a number.",
    "math": "Answer with the mathematical expression alone.",
    "OCR": "Answer with the text alone.",
    "open-ended": "Answer in plain text.",
    "spatial grounding": f'Answer with JSON, {{"boxes": [x1, y1, x2, y2]}}, {_THOUSANDTHS}.',
    "temporal grounding": 'Answer with JSON, {"time": [start, end]}, in seconds.',
    "spatial-temporal grounding": 'Answer with JSON, {"time": [start, end], "boxes": {"second": [x1, y1, x2, y2]}}, '
    f"with a box for every whole second, {_THOUSANDTHS}.",
    "tracking": f'Answer with JSON, {{"boxes": {{"second": [x1, y1, x2, y2]}}}}, {_THOUSANDTHS}.',
    "segmentation": 'Answer with JSON, {"boxes": [x1, y1, x2, y2], "positive_points": [[x, y], [x, y], [x, y]], '
    f'"negative_points": [[x, y], [x, y], [x, y]]}}, {_THOUSANDTHS}.',
}
_KEPT = ("problem_id", "data_source", "problem_type", "options")


def _matches(record: Mapping[str, Any]) -> bool:
    return {"problem", "answer", "problem_type"} <= record.keys()


@register("openvlthinker", matches=_matches)
def openvlthinker(source: Path, *, subset: str | None = None, form: bool = True) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{problem, options, answer, problem_type, task_type, images}``.

    The problem type is the answer format, by the same name, and the task type is the task; OneThinker's rows have no
    task type, and their problem type is the task. The options of a multiple choice follow the question, a line each,
    unless it has them already. Boxes and points are marked as relative, ``box_frame``. Rows of videos are rejected.

    Args:
        source: what ``read_records`` reads.
        subset: name of a Hugging Face dataset's configuration.
        form: whether a last line of the question says in which form the answer is compared.

    Raises:
        DataError: the source cannot be read.
    """
    return each(source, subset, partial(_sample, form=form))


def _sample(record: Record, form: bool) -> ImportedSample:
    refuse_video(record)
    kind = needed(record, "problem_type")
    if not isinstance(kind, str):
        raise Refusal(record.name, "field 'problem_type' is no text", repr(kind)[:80])
    question = needed(record, "problem")
    options = lookup(record.fields, "options") or []
    if not isinstance(options, list):
        raise Refusal(record.name, "field 'options' is no list", repr(options)[:80])
    if isinstance(question, str) and not all(str(option) in question for option in options):
        question = "\n".join([question, "Options:", *map(str, options)])
    if form and isinstance(question, str) and kind in _FORMS:
        question = f"{question}\n{_FORMS[kind]}"
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
