# SPDX-License-Identifier: Apache-2.0
"""Random access to webdataset shards: any sample is found by its entry in the index and decoded when it is read."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.errors import DataError, SampleError, because
from megatron_g2rpo.data.fields import SAMPLE_FIELDS
from megatron_g2rpo.data.images import EncodedImages
from megatron_g2rpo.data.importers.guess import advice_for
from megatron_g2rpo.data.shard_format import (
    INDEX_NAME,
    READABLE_VERSIONS,
    Member,
    how_to_index,
    parse_fields,
    sha256_of,
)
from megatron_g2rpo.data.tar_members import tars_of
from megatron_g2rpo.types import Sample


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The place of one sample: its shard, key and task, and member suffix -> its place in the shard."""

    shard: Path
    key: str
    task: str
    members: Mapping[str, Member]

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
        DataError: the path is no dataset, there is no index or it is broken, a shard is missing, truncated or not in
            the index, or a task is not in ``known_tasks``. The message names the path.
    """

    def __init__(self, path: str | Path, known_tasks: Collection[str] | None = None) -> None:
        path = Path(path)
        self.directory, pattern = _locate(path)
        index = _load_index(self.directory)
        try:
            records = [record for record in index if fnmatch.fnmatch(record["name"], pattern)]
            if not records:
                raise DataError(f"no shard of {self.directory / INDEX_NAME} matches {path}")
            _check_files(self.directory, pattern, records)
            self._take(records)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.directory / INDEX_NAME}: not what this program writes ({type(error).__name__}: {error}); "
                f"build it again with: {how_to_index(self.directory)}"
            ) from error
        if known_tasks is not None:
            self._check_tasks(known_tasks)

    def _take(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Set the attributes from the index's records of the shards in use."""
        self.shards = [self.directory / record["name"] for record in records]
        self.fingerprint = hashlib.sha256("".join(f"{r['name']} {r['sha256']}\n" for r in records).encode()).hexdigest()
        self._sha256 = {record["name"]: record["sha256"] for record in records}
        self._verified: set[str] = set()  # shards without CRCs whose content was compared with the sha256
        entries: defaultdict[str, list[Entry]] = defaultdict(list)
        for shard, record in zip(self.shards, records, strict=True):
            for s in record["samples"]:
                members = {suffix: Member(*place) for suffix, place in s["members"].items()}
                entries[s["task"]].append(Entry(shard=shard, key=s["key"], task=s["task"], members=members))
        self._entries = dict(entries)
        formats: defaultdict[str, set[str]] = defaultdict(set)
        for record in records:
            for task, names in record.get("answer_formats", {}).items():
                formats[task].update(names)
        self.answer_formats = {task: tuple(sorted(names)) for task, names in formats.items()}
        self.tasks = tuple(sorted(entries))

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
        """Read the json of a sample, and nothing of its images.

        Raises:
            SampleError: the json is broken or not what was indexed, or a field is missing or of the wrong type.
            DataError: the shard cannot be read.
        """
        return parse_fields(self._read(entry, "json"), entry.shard.name, entry.key)

    def read(self, entry: Entry) -> Sample:
        """Read a sample; its images are read, too, but decoded (to RGB) whenever one is taken.

        Raises:
            SampleError: as ``read_fields``, or an image is missing or not what was indexed; that an image cannot be
                decoded is found when it is taken. The message names shard, sample and member.
            DataError: the shard cannot be read.
        """
        fields = self.read_fields(entry)
        names = [f"{_where(entry)}: image {suffix!r}" for suffix in fields["images"]]
        return Sample(
            key=entry.name,
            task=fields["task"],
            question=fields["question"],
            answer=fields["answer"],
            answer_format=fields["answer_format"],
            images=EncodedImages([self._read(entry, suffix) for suffix in fields["images"]], names),
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
            self._verify(shard)

    def _verify(self, shard: Path) -> None:
        if sha256_of(shard) != self._sha256[shard.name]:
            raise DataError(f"{shard}: its content is not what {INDEX_NAME} recorded; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"restore it, or, if the change was meant, build the index again with: {how_to_index(self.directory)}"

    @because("contents")
    def _read(self, entry: Entry, suffix: str) -> bytes:
        """Read a member, and compare it with what was indexed."""
        member = entry.members.get(suffix) or entry.members.get(suffix.lower())
        if member is None:
            raise SampleError(f"{_where(entry)}: no member {suffix!r}; it has {', '.join(entry.members)}")
        if member.crc32 is None and entry.shard.name not in self._verified:
            self._verify(entry.shard)
            self._verified.add(entry.shard.name)
        try:
            with entry.shard.open("rb") as file:
                file.seek(member.offset)
                data = file.read(member.length)
        except OSError as error:
            raise DataError(f"shard {entry.shard} cannot be read: {error.strerror}") from error
        if len(data) != member.length:
            raise DataError(f"shard {entry.shard} ends inside sample {entry.key!r}: it was truncated while in use")
        if member.crc32 is not None and zlib.crc32(data) != member.crc32:
            raise SampleError(f"{_where(entry)}: {suffix!r} is not what {INDEX_NAME} recorded; {self._remedy}")
        return data

    def _check_tasks(self, known_tasks: Collection[str]) -> None:
        unknown = [task for task in self.tasks if task not in known_tasks]
        if unknown:
            listed = ", ".join(f"task {task!r} (first sample {self._entries[task][0].name})" for task in unknown)
            raise DataError(
                f"{self.directory}: {listed} {'is' if len(unknown) == 1 else 'are'} not listed under env.tasks, which "
                f"has {', '.join(sorted(known_tasks))}; add {'it' if len(unknown) == 1 else 'them'} there"
            )


def _locate(path: Path) -> tuple[Path, str]:
    """Return the directory of a dataset and the pattern of its shards' names."""
    if path.is_dir():
        return path, "*.tar"
    is_pattern = next(path.parent.glob(path.name), None) is not None or (path.parent / INDEX_NAME).exists()
    if (path.exists() and path.suffix != ".tar") or not is_pattern:
        raise DataError(advice_for(path))
    return path.parent, path.name


def _load_index(directory: Path) -> list[dict[str, Any]]:
    path = directory / INDEX_NAME
    remedy = f"build it again with: {how_to_index(directory)}"
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(advice_for(directory)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken json ({error}); {remedy}") from error
    if not isinstance(index, dict):
        raise DataError(f"{path}: no index, but a {type(index).__name__}; {remedy}")
    if index.get("version") not in READABLE_VERSIONS:
        versions = " and ".join(map(str, READABLE_VERSIONS))
        raise DataError(f"{path}: version {index.get('version')!r}, this program reads {versions}; {remedy}")
    if not isinstance(index.get("shards"), list):
        raise DataError(f"{path}: lacks the list of shards; {remedy}")
    return index["shards"]


def _check_files(directory: Path, pattern: str, records: Sequence[Mapping[str, Any]]) -> None:
    again = f"build the index again with: {how_to_index(directory)}"
    known = {record["name"] for record in records}
    for record in records:
        path = directory / record["name"]
        if not path.exists():
            raise DataError(f"shard {path} is named in {INDEX_NAME} but missing; restore it, or {again}")
        size = path.stat().st_size
        if size != record["bytes"]:
            kind = "truncated" if size < record["bytes"] else "longer than indexed"
            raise DataError(
                f"shard {path} is {kind}: {size} bytes, the index says {record['bytes']}; copy it again, or, if the "
                f"change was meant, {again}"
            )
    for path in tars_of(directory, pattern):
        if path.name not in known:
            raise DataError(f"shard {path} is not in {INDEX_NAME}; {again}")


def _where(entry: Entry) -> str:
    return f"shard {entry.shard.name}, sample {entry.key!r}"
