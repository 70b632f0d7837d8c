# SPDX-License-Identifier: Apache-2.0
"""The files that an evaluation writes as it goes, JSON lines, and where an interrupted one goes on.

``answers.jsonl`` has one line a response, ``unusable.jsonl`` one line a sample that could not be asked or scored. Both
are in the order of the dataset, whatever the number of processes. A line names its sample, so that what is on file need
not be asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ANSWERS, UNUSABLE = "answers.jsonl", "unusable.jsonl"

Record = dict[str, Any]


class EvaluationError(ValueError):
    """An evaluation's directory cannot be used; the message names the file, and says what to do."""


class _Line(NamedTuple):
    record: Record
    end: int


def finished(directory: Path, samples: int) -> set[str]:
    """The keys of the samples that an evaluation is done with, so that it can go on after them.

    What an interrupted evaluation left incomplete at the end of a file is cut off: a half-written line, and the
    responses to a sample that has fewer of them than it should.

    Args:
        directory: the evaluation's directory.
        samples: number of responses to each sample.

    Raises:
        EvaluationError: a file is damaged elsewhere than at its end.
    """
    answered = _recover(directory / ANSWERS, samples)
    unusable = _recover(directory / UNUSABLE, 1)
    return answered | unusable


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as lines, which are on the disk when this returns."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a file, which may not exist yet; a half-written last line is left out.

    Raises:
        EvaluationError: a line is no record of an evaluation.
    """
    for line in _lines(path):
        yield line.record


def _recover(path: Path, per_key: int) -> set[str]:
    """Cut off what is incomplete at the end of a file, and return the keys of the rest."""
    counts: dict[str, int] = {}
    begin = end = 0  # of the last key's lines
    last: str | None = None
    for line in _lines(path):
        key = line.record["key"]
        if key != last:
            if key in counts:
                raise EvaluationError(f"{path}: the lines of sample {key} do not stand together; {_ADVICE}")
            if last is not None and counts[last] != per_key:
                raise EvaluationError(f"{path}: sample {last} has {counts[last]} lines, not {per_key}; {_ADVICE}")
            last, begin = key, end
        counts[key] = counts.get(key, 0) + 1
        end = line.end
    if last is not None and counts[last] > per_key:
        raise EvaluationError(f"{path}: sample {last} has {counts[last]} lines, not {per_key}; {_ADVICE}")
    if last is not None and counts[last] < per_key:
        del counts[last]
        end = begin
    if path.exists() and path.stat().st_size != end:
        os.truncate(path, end)
    return set(counts)


_ADVICE = "repair it, or start anew with --fresh"


def _lines(path: Path) -> Iterator[_Line]:
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # half-written
            try:
                record = json.loads(line)
            except ValueError as error:
                raise EvaluationError(f"{path}:{number}: not JSON ({error}); {_ADVICE}") from error
            if not isinstance(record, dict) or not isinstance(record.get("key"), str):
                raise EvaluationError(f"{path}:{number}: no record of an evaluation; {_ADVICE}")
            end += len(line)
            yield _Line(record, end)
