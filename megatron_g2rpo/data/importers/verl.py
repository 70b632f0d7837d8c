# SPDX-License-Identifier: Apache-2.0
"""The importer of verl's Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.importers.base import ImportedSample, Rejected, register
from megatron_g2rpo.data.importers.records import Record
from megatron_g2rpo.data.importers.rows import each, needed, refuse_video
from megatron_g2rpo.data.importers.turns import System, question_of, shown_images, turns_of
from megatron_g2rpo.data.importers.values import lookup, rest


def _matches(record: Mapping[str, Any]) -> bool:
    return "prompt" in record and isinstance(record.get("reward_model"), Mapping)


@register("verl", matches=_matches)
def verl(source: Path, *, system: System = "refuse", subset: str | None = None) -> Iterator[ImportedSample | Rejected]:
    """Read rows ``{data_source, prompt, images, reward_model: {ground_truth}}``; all other fields are kept.

    The data source is the task. The answer format is not named: ``--answer-format`` does.

    Args:
        source: what ``read_records`` reads, Parquet as a rule.
        system: what becomes of a row with a system message: refused, or imported without it.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        DataError: the source cannot be read.
    """

    def convert(record: Record) -> ImportedSample:
        refuse_video(record)
        turn = question_of(turns_of(needed(record, "prompt"), record.name), record.name, system)
        fields = rest(record.fields, ("prompt", "images", "reward_model"))
        fields |= {"question": turn.text, "answer": needed(record, "reward_model.ground_truth")}
        if (task := lookup(record.fields, "data_source")) is not None:
            fields["task"] = task
        pictures = shown_images(turn, lookup(record.fields, "images"), record.name)
        return ImportedSample(name=record.name, fields=fields, images=pictures, record=record.fields)

    return each(source, subset, convert)
