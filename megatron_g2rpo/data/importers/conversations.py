# SPDX-License-Identifier: Apache-2.0
"""The importers of supervised conversations: LLaVA's, and ShareGPT's and OpenAI's messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Refusal, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video
from megatron_g2rpo.data.importers.turns import System, Turn, exchange_of, shown_images, turns_of
from megatron_g2rpo.data.importers.values import lookup, rest


def _matches_llava(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list)


def _matches_sharegpt(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("messages"), list)


@register("llava", matches=_matches_llava)
def llava(source: Path, *, system: System = "refuse", subset: str | None = None) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{conversations: [{from, value}], image}``, of one question and one answer; other fields are kept.

    The answer is the sample's ``response``, for ``megatron-g2rpo sft``, and its reference answer.

    Args:
        source: what ``read_records`` reads, JSON as a rule.
        system: what becomes of a row with a system message: refused, or imported without it.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """

    def convert(record: Record) -> ImportedSample:
        refuse_video(record)
        turns = turns_of(needed(record, "conversations"), record.name, "from", "value")
        return _sample(record, turns, "conversations", system)

    return each(source, subset, convert)


@register("sharegpt", matches=_matches_sharegpt)
def sharegpt(
    source: Path, *, system: System = "refuse", subset: str | None = None
) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{messages: [{role, content}], images}``, of one question and one answer; other fields are kept.

    A content may be a list of parts, texts and images, as OpenAI's interface and NeMo-RL have them. The answer is the
    sample's ``response``, for ``megatron-g2rpo sft``, and its reference answer; NeMo-RL's ``task_name`` is the task.

    Args:
        source: what ``read_records`` reads, JSON as a rule.
        system: what becomes of a row with a system message: refused, or imported without it.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """

    def convert(record: Record) -> ImportedSample:
        refuse_video(record)
        sample = _sample(record, turns_of(needed(record, "messages"), record.name), "messages", system)
        task = lookup(record.fields, "task_name")
        if task is None or "task" in sample.fields:
            return sample
        return ImportedSample(
            name=sample.name, fields={**sample.fields, "task": task}, images=sample.images, record=sample.record
        )

    return each(source, subset, convert)


def _sample(record: Record, turns: list[Turn], column: str, system: System) -> ImportedSample:
    question, answer = exchange_of(turns, record.name, system)
    beside = [lookup(record.fields, field) for field in ("images", "image")]
    if all(beside):
        raise Refusal(record.name, "the fields 'image' and 'images' both hold images")
    fields = rest(record.fields, (column, "images", "image"))
    fields |= {"question": question.text, "answer": answer, "response": answer}
    pictures = shown_images(question, beside[0] or beside[1], record.name)
    return ImportedSample(name=record.name, fields=fields, images=pictures, record=record.fields)
