# SPDX-License-Identifier: Apache-2.0
"""The samples that a page carries: whole groups of rollouts, compressed, and an index that the page filters.

The index is one JSON object of columns, a row a rollout. The groups lie in chunks, each the gzip of a JSON array, in
base64; a chunk is opened when a group of it is shown. Log-probabilities and entropies are kept in hundredths of a nat.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_g2rpo.records.schema import REWARD_PREFIX
from megatron_g2rpo.report import selection
from megatron_g2rpo.report.pictures import Pictures, boxes_in
from megatron_g2rpo.report.rollouts import Overview, read_rows
from megatron_g2rpo.report.run_directory import RunDirectory
from megatron_g2rpo.report.statistics import changes_since_last_time
from megatron_g2rpo.report.vocabulary import Vocabulary

LONGEST_TEXT = 20_000  # characters of one text that a page shows
MOST_TOKENS = 5_000  # of one response
CHUNK_ROLLOUTS = 256
TRIAL_GROUPS = 48
NATS = 100  # steps of a nat that values are rounded to


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a page carries of a run's rollouts.

    Attributes:
        index: column -> a value for each rollout. ``task`` counts ``tasks``; ``chunk``, ``group`` and ``place`` tell
            where the rollout is; ``change`` is that of its prompt since it was drawn last.
        tasks: names of the tasks.
        chunks: base64 text of each chunk.
        pictures: thumbnails as ``data:`` addresses.
        vocabulary: token id, as text -> its text.
        shown: number of rollouts that the page carries.
        recorded: number of rollouts that the run recorded.
        notes: what a reader must know of what is left out.
    """

    index: Mapping[str, Sequence[Any]]
    tasks: Sequence[str]
    chunks: Sequence[str]
    pictures: Sequence[str]
    vocabulary: Mapping[str, str]
    shown: int
    recorded: int
    notes: Sequence[str]

    @property
    def size(self) -> int:
        """About how many bytes of the page they take."""
        parts = (packed(self.index), *self.chunks, *self.pictures, json.dumps(self.vocabulary))
        return sum(map(len, parts))


def samples_of(run: RunDirectory, overview: Overview, budget: float) -> Samples:
    """Choose groups within a budget, spread evenly over tasks and steps, and encode them.

    Args:
        run: the run.
        overview: its recorded rollouts.
        budget: bytes of the page that they may take.

    Raises:
        ReportError: a file changed while it was read.
    """
    groups = overview.groups()
    order = selection.balanced(overview, groups)
    sizes = selection.estimated_bytes(overview, groups, LONGEST_TEXT, MOST_TOKENS)
    pictures, vocabulary, change = Pictures(run), Vocabulary(run), changes_since_last_time(overview)

    def encoded(chosen: Sequence[int]) -> Samples:
        return _Encoder(run, overview, pictures, change).encode([groups[each] for each in sorted(chosen)], vocabulary)

    # What texts and pictures come to is measured on a few groups of every task; the estimate says how others compare.
    trial = order[:TRIAL_GROUPS]
    scale = encoded(trial).size / sizes[trial].sum() if trial else 1.0
    chosen = selection.within(order, sizes * scale, budget)
    while True:
        found = encoded(chosen)
        if found.size <= budget or len(chosen) <= 1:
            return found
        chosen = chosen[: max(1, int(len(chosen) * min(0.95, 0.97 * budget / found.size)))]


@dataclass
class _Encoder:
    """Turns groups into chunks; one use."""

    run: RunDirectory
    overview: Overview
    pictures: Pictures
    change: np.ndarray
    notes: list[str] = field(default_factory=list)
    _picture_numbers: dict[str, int] = field(default_factory=dict)
    _picture_uris: list[str] = field(default_factory=list)
    _cut: int = 0
    _used_ids: set[int] = field(default_factory=set)

    def encode(self, groups: Sequence[np.ndarray], vocabulary: Vocabulary) -> Samples:
        overview = self.overview
        rows = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
        index: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        chunks: list[str] = []
        pending: list[dict[str, Any]] = []
        count = 0
        for members, records in _by_group(overview, groups):
            for place, row in enumerate(members):
                self._add(index, row, len(chunks), len(pending), place)
            pending.append(self._group(records))
            count += len(members)
            if count >= CHUNK_ROLLOUTS:
                chunks.append(packed(pending))
                pending, count = [], 0
        if pending:
            chunks.append(packed(pending))
        return Samples(
            index=index,
            tasks=self._tasks,
            chunks=chunks,
            pictures=self._picture_uris,
            vocabulary={str(token): text for token, text in vocabulary.texts(self._used_ids).items()},
            shown=len(rows),
            recorded=len(overview),
            notes=self._notes(len(rows), vocabulary),
        )

    @cached_property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys([*self.run.tasks, *sorted(set(self.overview.task))]))

    def _notes(self, shown: int, vocabulary: Vocabulary) -> list[str]:
        notes = []
        if shown < len(self.overview):
            notes.append(
                f"The page carries {shown:,} of {len(self.overview):,} recorded rollouts: whole groups, spread evenly "
                "over tasks and steps. All of them are in the run's rollouts/*.parquet."
            )
        if self._cut:
            notes.append(f"Texts of more than {LONGEST_TEXT:,} characters are cut, and say so: {self._cut:,} of them.")
        return [*notes, *([vocabulary.fault] if vocabulary.fault else [])]

    def _add(self, index: dict[str, list[Any]], row: int, chunk: int, group: int, place: int) -> None:
        overview = self.overview
        values = {
            "step": int(overview.step[row]),
            "task": self._tasks.index(overview.task[row]),
            "reward": _rounded(overview.reward[row]),
            "tokens": int(overview.tokens[row]),
            "truncated": int(overview.truncated[row]),
            "advantage": _rounded(overview.advantage[row]),
            "change": _rounded(self.change[row]),
            "chunk": chunk,
            "group": group,
            "place": place,
        }
        for name, value in values.items():
            index[name].append(value)

    def _group(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first = records[0]
        images = list(first["images"] or ())
        sizes = list(zip(first["image_widths"] or (), first["image_heights"] or (), strict=False))
        sample = self.pictures.sample(images[0].rpartition("#")[0])[0] if images else None
        shown_in = (sample.extra.get("box_image", 0) if sample is not None else 0) or 0
        answer_format = first["answer_format"]
        return {
            "step": first["step"],
            "task": first["task"],
            "key": first["prompt_key"],
            "weights": first["weights_version"],
            "question": self._text(first["question"]),
            "prompt": self._text(first["prompt_text"]),
            "reference": self._text(first["reference"]),
            "format": answer_format,
            "images": [self._picture(reference) for reference in images],
            "boxed": shown_in,
            "boxes": boxes_in(first["reference"], answer_format, sample, sizes, is_reference=True),
            "rows": [
                self._row(each, boxes_in(each["answer"], answer_format, sample, sizes, is_reference=False))
                for each in records
            ],
        }

    def _row(self, record: Mapping[str, Any], boxes: Sequence[Any]) -> dict[str, Any]:
        ids = list(record["response_ids"] or ())[:MOST_TOKENS]
        self._used_ids.update(ids)
        parts = {
            name.removeprefix(REWARD_PREFIX): _rounded(value)
            for name, value in record.items()
            if name.startswith(REWARD_PREFIX) and value is not None
        }
        return {
            "sample": record["sample_index"],
            "text": self._text(record["response_text"]),
            "answer": None if record["answer"] is None else self._text(record["answer"]),
            "formed": bool(record["well_formed"]),
            "masked": record["masked"],
            "engine": record["engine"],
            "parts": parts,
            "boxes": boxes,
            "ids": ids,
            "behaviour": _hundredths(record["behaviour_logprobs"]),
            "old": _hundredths(record["old_logprobs"]),
            "entropy": _hundredths(record["entropies"]),
        }

    def _text(self, text: str | None) -> str:
        text = text or ""
        if len(text) <= LONGEST_TEXT:
            return text
        self._cut += 1
        return f"{text[:LONGEST_TEXT]} [... {len(text) - LONGEST_TEXT:,} more characters are in the run's records]"

    def _picture(self, reference: str) -> dict[str, Any]:
        """Number of the image's thumbnail, or why there is none."""
        if reference not in self._picture_numbers:
            picture = self.pictures.picture(reference)
            if not picture.uri:
                return {"name": reference, "fault": picture.fault}
            self._picture_numbers[reference] = len(self._picture_uris)
            self._picture_uris.append(picture.uri)
        return {"name": reference, "picture": self._picture_numbers[reference]}


_COLUMNS = ("step", "task", "reward", "tokens", "truncated", "advantage", "change", "chunk", "group", "place")


def _by_group(overview: Overview, groups: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[Mapping[str, Any]]]]:
    """Yield the rows of each group with their records; of the rows that lie in one file, the file is read once."""
    if not groups:
        return
    place = {row: number for number, rows in enumerate(groups) for row in rows.tolist()}
    waiting: list[dict[int, Any]] = [{} for _ in groups]
    done = 0
    for row, record in read_rows(overview, np.concatenate(groups)):
        waiting[place[row]][row] = record
        # Groups are in the order of their steps, as files are: what is complete is given out and forgotten.
        while done < len(groups) and len(waiting[done]) == len(groups[done]):
            yield groups[done].tolist(), [waiting[done].pop(member) for member in groups[done].tolist()]
            done += 1


def packed(value: Any) -> str:
    """Return the base64 text of the gzip of a value's JSON, which is ASCII whatever characters the value has."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _hundredths(values: Sequence[float] | None) -> list[int | None]:
    return [
        None if value is None or not math.isfinite(value) else round(NATS * value)
        for value in (values or ())[:MOST_TOKENS]
    ]
