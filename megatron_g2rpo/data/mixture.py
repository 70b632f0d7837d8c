# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one: their samples by task, each with the weight that its dataset is drawn with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.types import Sample


@dataclass(frozen=True)
class Source:
    """Samples of one task that are drawn alike.

    Attributes:
        share: share of the task's draws, of 1.
        entries: the samples.
    """

    share: float
    entries: Sequence[Entry]


@dataclass(frozen=True)
class ShardContent:
    """What a saved position knows of a shard.

    Attributes:
        name: ``<dataset's number>/<file name>``, or the file name alone where there is one dataset: a dataset may move.
        sha256: first 16 hex digits of the file's sha256.
        samples: first 16 hex digits of the sha256 of the tasks and keys of its samples, in their order.
    """

    name: str
    sha256: str
    samples: str


class Mixture:
    """One or several datasets.

    A dataset of weight ``w`` that has ``n`` samples of a task gets a share of the task's draws in proportion to ``w *
    n``: with equal weights every sample is drawn once in an epoch of the task, as if the datasets were one; a weight of
    2 draws each sample of a dataset twice as often as one of a dataset of weight 1.

    Attributes:
        tasks: names of the tasks that occur, sorted.
        fingerprint: hex digest of the content; that of the dataset itself where there is one.
        weights: one for each dataset where they differ; None where all are drawn alike.

    Args:
        parts: the datasets.
        weights: one for each; None: all are equal.

    Raises:
        DataError: there is no dataset, a weight is not above 0, or a shard occurs twice.
    """

    def __init__(self, parts: Sequence[ShardIndex], weights: Sequence[float] | None = None) -> None:
        if not parts:
            raise DataError("no dataset is named")
        self._parts = list(parts)
        weights = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
        for part, weight in zip(self._parts, weights, strict=True):
            if not 0.0 < weight < math.inf:
                raise DataError(f"{part.directory}: its weight is {weight}; a weight is above 0, and finite")
        self.weights = None if len(set(weights)) == 1 else tuple(weights)
        self.tasks = tuple(sorted({task for part in parts for task in part.tasks}))
        self.fingerprint = (
            parts[0].fingerprint
            if len(parts) == 1
            else hashlib.sha256("".join(f"{part.fingerprint}\n" for part in parts).encode()).hexdigest()
        )
        self._part_of: dict[Path, int] = {}
        for number, part in enumerate(self._parts):
            for shard in part.shards:
                known = self._part_of.setdefault(shard.resolve(), number)
                if known != number:
                    raise DataError(f"shard {shard} is named twice, by {parts[known].directory} and {part.directory}")
        self._part_of.update((shard, n) for n, part in enumerate(self._parts) for shard in part.shards)
        self._by_name: dict[str, Entry] | None = None  # once a sample was asked for by its name
        self._prefixes = [""] if len(parts) == 1 else _prefixes([part.directory for part in parts])

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def sources(self, task: str) -> list[Source]:
        """Return what a task is drawn from; one source where all datasets are drawn alike. Empty for a foreign task."""
        parts = [
            (part.entries(task), weight)
            for part, weight in zip(self._parts, self.weights or [1.0] * len(self._parts), strict=True)
            if task in part.tasks
        ]
        if len({weight for _, weight in parts}) == 1:
            return [Source(1.0, [entry for entries, _ in parts for entry in entries])]
        total = sum(weight * len(entries) for entries, weight in parts)
        return [Source(weight * len(entries) / total, entries) for entries, weight in parts]

    def first(self, task: str, count: int) -> list[Entry]:
        """Return the first samples of a task, of each dataset in turn; all of them where there are fewer."""
        rows = zip_longest(*(part.entries(task) for part in self._parts if task in part.tasks))
        return [entry for row in rows for entry in row if entry is not None][:count]

    def find(self, key: str) -> Entry:
        """Return the entry of the sample that has a key, see ``name``.

        Raises:
            DataError: there is none.
        """
        if self._by_name is None:
            entries = (entry for part in self._parts for task in part.tasks for entry in part.entries(task))
            self._by_name = {self.name(entry): entry for entry in entries}
        if key not in self._by_name:
            raise DataError(f"no sample {key!r} in {', '.join(str(part.directory) for part in self._parts)}")
        return self._by_name[key]

    def name(self, entry: Entry) -> str:
        """Return the key of an entry's sample. Where there are several datasets, it begins with the end of a path."""
        prefix = self._prefixes[self._part_of[entry.shard]]
        return f"{prefix}/{entry.name}" if prefix else entry.name

    def read(self, entry: Entry) -> Sample:
        """Read a sample. Where there are several datasets, its key is that of ``name``.

        Raises:
            SampleError: see ``ShardIndex.read``.
        """
        number = self._part_of[entry.shard]
        prefix = self._prefixes[number]
        try:
            sample = self._parts[number].read(entry)
        except SampleError as error:
            if not prefix:
                raise
            raise SampleError(f"{prefix}: {error}", error.reason) from error
        return replace(sample, key=self.name(entry)) if prefix else sample

    def contents(self) -> list[ShardContent]:
        """Return what is known of every shard, in their order."""
        found = []
        for number, part in enumerate(self._parts):
            digests = {shard: hashlib.sha256() for shard in part.shards}
            for task in part.tasks:
                for entry in part.entries(task):
                    digests[entry.shard].update(f"{task}\0{entry.key}\n".encode())
            sha256 = part.checksums
            found += [
                ShardContent(
                    f"{number}/{shard.name}" if len(self._parts) > 1 else shard.name,
                    sha256[shard.name][:16],
                    digests[shard].hexdigest()[:16],
                )
                for shard in part.shards
            ]
        return found


def _prefixes(directories: Sequence[Path]) -> list[str]:
    """Return the end of each directory's path, as many names as tell them apart: ``a/train``, ``b/train``."""
    paths = [directory.resolve() for directory in directories]
    distinct: Collection[Path] = set(paths)
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        ends = {path: "/".join(path.parts[-length:]) for path in distinct}
        if len(set(ends.values())) == len(distinct):
            return [ends[path] for path in paths]
    return [str(path) for path in paths]
