# SPDX-License-Identifier: Apache-2.0
"""Random access to webdataset shards: any sample is found by its entry in the index and decoded when it is read."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_format import INDEX_NAME, INDEX_VERSION, SAMPLE_FIELDS, parse_fields, sha256_of
from megatron_g2rpo.types import Sample

# What PIL raises for damaged files: OSError (and UnidentifiedImageError) for most, SyntaxError for broken PNG chunks,
# ValueError and EOFError for impossible or missing data, DecompressionBombError for absurd dimensions.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The place of one sample: its shard, key and task, and member suffix -> (offset, length) in bytes."""

    shard: Path
    key: str
    task: str
    members: Mapping[str, tuple[int, int]]

    @property
    def name(self) -> str:
        """The sample's name, ``<shard>/<key>``, which is unique in the dataset; error messages use it."""
        return f"{self.shard.stem}/{self.key}"


class ShardIndex:
    """The samples of a dataset, by task, in the order of the shards.

    Attributes:
        directory: directory that holds shards and index.
        shards: paths of the shards in use.
        tasks: names of the tasks that occur, sorted.
        answer_formats: task -> names of the answer formats of its samples; a task is absent where the index was written
            by a version that did not record them.
        fingerprint: hex digest of the content (names and sha256 of the shards in use); equal data, equal fingerprint.

    Args:
        path: a directory of shards, a glob of ``.tar`` files in one directory, or one ``.tar`` file.
        known_tasks: the tasks that a recipe lists (``env.tasks``); None accepts any.

    Raises:
        DataError: there is no index or no sample, a shard is missing, truncated or not in the index, or a task is not
            in ``known_tasks``. The message names the path.
    """

    def __init__(self, path: str | Path, known_tasks: Collection[str] | None = None) -> None:
        path = Path(path)
        if not path.exists() and not (path.parent / INDEX_NAME).exists():
            raise DataError(f"{path} does not exist; name a directory of shards, a glob of .tar files or one of them")
        self.directory, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
        records = [r for r in _load_index(self.directory) if fnmatch.fnmatch(r["name"], pattern)]
        if not records:
            raise DataError(f"no shard of {self.directory / INDEX_NAME} matches {path}")
        _check_files(self.directory, pattern, records)
        self.shards = [self.directory / record["name"] for record in records]
        self.fingerprint = hashlib.sha256("".join(f"{r['name']} {r['sha256']}\n" for r in records).encode()).hexdigest()
        self._sha256 = {record["name"]: record["sha256"] for record in records}
        entries: defaultdict[str, list[Entry]] = defaultdict(list)
        for shard, record in zip(self.shards, records, strict=True):
            for s in record["samples"]:
                members = {suffix: (offset, length) for suffix, (offset, length) in s["members"].items()}
                entries[s["task"]].append(Entry(shard=shard, key=s["key"], task=s["task"], members=members))
        self._entries = dict(entries)
        formats: defaultdict[str, set[str]] = defaultdict(set)
        for record in records:
            for task, names in record.get("answer_formats", {}).items():
                formats[task].update(names)
        self.answer_formats = {task: tuple(sorted(names)) for task, names in formats.items()}
        self.tasks = tuple(sorted(entries))
        if known_tasks is not None:
            self._check_tasks(known_tasks)

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    @property
    def checksums(self) -> Mapping[str, str]:
        """File name of each shard in use -> the sha256 that the index recorded, hex digits."""
        return dict(self._sha256)

    def entries(self, task: str) -> Sequence[Entry]:
        """Return the entries of one task's samples, in the order of the shards.

        Raises:
            DataError: the task does not occur.
        """
        if task not in self._entries:
            raise DataError(f"{self.directory} has no task {task!r}; it has {', '.join(self.tasks)}")
        return self._entries[task]

    def read_fields(self, entry: Entry) -> dict[str, Any]:
        """Read the json of a sample without decoding its images.

        Raises:
            SampleError: the json is broken, or lacks a field.
        """
        return parse_fields(_read(entry, "json"), entry.shard.name, entry.key)

    def read(self, entry: Entry) -> Sample:
        """Read a sample, with its images decoded to RGB.

        Raises:
            SampleError: the json is broken, or an image cannot be decoded; the message names shard, sample and member.
        """
        fields = self.read_fields(entry)
        return Sample(
            key=entry.name,
            task=fields["task"],
            question=fields["question"],
            answer=fields["answer"],
            answer_format=fields["answer_format"],
            images=tuple(_read_image(entry, suffix) for suffix in fields["images"]),
            response=fields.get("response"),
            extra={name: value for name, value in fields.items() if name not in SAMPLE_FIELDS},
        )

    def iterate_fields(self) -> Iterator[dict[str, Any]]:
        """Yield the json of every sample, task by task."""
        for task in self.tasks:
            for entry in self._entries[task]:
                yield self.read_fields(entry)

    def verify(self) -> None:
        """Compare every shard with its sha256 in the index, which reads all bytes.

        Raises:
            DataError: the content of a shard differs from what was indexed.
        """
        for shard in self.shards:
            if sha256_of(shard) != self._sha256[shard.name]:
                raise DataError(f"{shard}: its content is not what {INDEX_NAME} recorded; build the index again")

    def _check_tasks(self, known_tasks: Collection[str]) -> None:
        for task in self.tasks:
            if task not in known_tasks:
                raise DataError(
                    f"{self.directory}: task {task!r} (first sample {self._entries[task][0].name}) is not listed under "
                    f"env.tasks, which has {', '.join(sorted(known_tasks))}; add it there"
                )


def _load_index(directory: Path) -> list[dict[str, Any]]:
    path = directory / INDEX_NAME
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; write it with: python -m megatron_g2rpo.data.shard_writer {directory}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: broken json ({error}); write it again") from error
    if not isinstance(index, dict):
        raise DataError(f"{path}: no index, but a {type(index).__name__}; write it again")
    if index.get("version") != INDEX_VERSION:
        raise DataError(f"{path}: version {index.get('version')!r}, this program reads {INDEX_VERSION}; write it again")
    return index["shards"]


def _check_files(directory: Path, pattern: str, records: Sequence[Mapping[str, Any]]) -> None:
    known = {record["name"] for record in records}
    for record in records:
        path = directory / record["name"]
        if not path.exists():
            raise DataError(f"shard {path} is named in {INDEX_NAME} but missing; restore it, or build the index again")
        size = path.stat().st_size
        if size != record["bytes"]:
            kind = "truncated" if size < record["bytes"] else "longer than indexed"
            raise DataError(f"shard {path} is {kind}: {size} bytes, the index says {record['bytes']}; copy it again")
    for path in sorted(directory.glob(pattern)):
        if path.suffix == ".tar" and path.name not in known:
            raise DataError(f"shard {path} is not in {INDEX_NAME}; build the index again")


def _read(entry: Entry, suffix: str) -> bytes:
    if suffix not in entry.members:
        raise SampleError(f"shard {entry.shard.name}, sample {entry.key!r}: no member {suffix!r}")
    offset, length = entry.members[suffix]
    with entry.shard.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise DataError(f"shard {entry.shard} ends inside sample {entry.key!r}: it was truncated while in use")
    return data


def _read_image(entry: Entry, suffix: str) -> Image.Image:
    data = _read(entry, suffix)
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except DECODE_ERRORS as error:
        raise SampleError(
            f"shard {entry.shard.name}, sample {entry.key!r}: image {suffix!r} cannot be decoded "
            f"({type(error).__name__}: {error}); repair it, or set data.on_bad_sample=skip"
        ) from error
