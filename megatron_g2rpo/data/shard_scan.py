# SPDX-License-Identifier: Apache-2.0
"""Scanning of a tar of unknown origin for its samples: what the index records of one shard."""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_format import Member, parse_fields, sha256_of
from megatron_g2rpo.data.tar_members import content_of, key_of, keys_of, members_of

_logger = logging.getLogger(__name__)


def scan_shard(path: Path, *, skip_bad: bool = False) -> dict[str, Any]:
    """Return the entry of one shard in the index; ``members`` maps suffix -> [offset, length, CRC-32] of a member.

    A sample is a member ``<key>.json`` and all members ``<key>.<suffix>``. Keys may contain dots, although webdataset
    ends them at the first: a member belongs to the longest key that a json has. The case of suffixes does not matter.
    Members of no sample are left out, with a warning that counts them.

    Args:
        path: the shard.
        skip_bad: leave samples that cannot be used out, each with a warning, instead of raising.

    Raises:
        DataError: the file is no tar, a damaged one, or cannot be read.
        SampleError: a sample has a member twice or one that is a link or stored sparsely, its json cannot be used, or
            it names an image that does not exist.
    """
    try:
        with path.open("rb") as file:
            members = members_of(path, file)
            samples, strays = _by_key(members, keys_of(members, file))
            records, formats = _records(path.name, samples, file, skip_bad=skip_bad)
        size, digest = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if strays:
        examples = ", ".join(strays[:5]) + (", ..." if len(strays) > 5 else "")
        _logger.warning(
            "shard %s: %d members belong to no sample, for there is no json of their key: %s",
            path.name,
            len(strays),
            examples,
        )
    return {
        "name": path.name,
        "bytes": size,
        "sha256": digest,
        "num_samples": len(records),
        "tasks": dict(sorted(Counter(record["task"] for record in records).items())),
        "answer_formats": {task: sorted(names) for task, names in sorted(formats.items())},
        "samples": records,
    }


def _records(
    shard: str, samples: Mapping[str, Sequence[tarfile.TarInfo]], file: BinaryIO, *, skip_bad: bool
) -> tuple[list[dict[str, Any]], dict[str, set[str]]]:
    """Return the entries of all samples in the index, and task -> names of its answer formats."""
    records: list[dict[str, Any]] = []
    formats: defaultdict[str, set[str]] = defaultdict(set)
    for key, parts in samples.items():
        try:
            record, answer_format = _record(shard, key, parts, file)
        except SampleError as error:
            if not skip_bad:
                raise
            _logger.warning("left out: %s", error)
            continue
        records.append(record)
        formats[record["task"]].add(answer_format)
    return records, formats


def _by_key(members: Sequence[tarfile.TarInfo], keys: set[str]) -> tuple[dict[str, list[tarfile.TarInfo]], list[str]]:
    """Return key -> members in the order of the tar, and the names of members of no sample."""
    samples: dict[str, list[tarfile.TarInfo]] = {}
    strays = []
    for member in members:
        key = key_of(member.name, keys)
        if key is None:
            strays.append(member.name)
        else:
            samples.setdefault(key, []).append(member)
    return samples, strays


def _record(shard: str, key: str, parts: Sequence[tarfile.TarInfo], file: BinaryIO) -> tuple[dict[str, Any], str]:
    """Return the entry of a sample in the index, and the name of its answer format."""
    where, members, fields = f"shard {shard}, sample {key!r}", {}, {}
    if not key.isprintable():  # so is half of a surrogate pair, by which Python stands for bytes that are no UTF-8
        raise SampleError(f"{where}: the key holds characters that cannot be printed; give its files another name")
    for part in parts:
        suffix = part.name[len(key) + 1 :].lower()
        if suffix in members:
            raise SampleError(f"{where}: has the member {suffix!r} twice; keys must be unique in a shard")
        if not part.isreg():
            raise SampleError(f"{where}: member {suffix!r} is a link or device; pack the files (tar --dereference)")
        if part.issparse():
            raise SampleError(f"{where}: member {suffix!r} is stored sparsely; pack it without --sparse")
        data = content_of(part, file)
        members[suffix] = Member(part.offset_data, part.size, zlib.crc32(data))
        if suffix == "json":
            fields = parse_fields(data, shard, key)
    missing = [name for name in fields["images"] if name.lower() not in members]
    if missing:
        raise SampleError(f"{where}: names image {missing[0]!r}, which is not there; it has {', '.join(members)}")
    return {"key": key, "task": fields["task"], "members": members}, fields["answer_format"]
