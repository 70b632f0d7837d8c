# SPDX-License-Identifier: Apache-2.0
"""The format of a dataset: a directory of webdataset shards and one index.

A shard is plain webdataset: members ``<key>.json`` and ``<key>.<i>.png`` (or another format that ``images`` reads) form
one sample; the json holds the fields of ``types.Sample``, with ``images`` naming the image members in order, and
whatever else the maker adds (``Sample.extra``). The index records, per shard, its size in bytes, its sha256, where
every member lies with its CRC-32, and the tasks with their answer formats: a reader can go to any sample without
scanning a tar, and notices a missing, truncated or exchanged shard, and an unknown task or answer format, before the
first step, and changed content when it reads it.

Version 1 of the index, without CRCs, is read, too; the first sample read from a shard then costs a pass over the shard.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_g2rpo.data.errors import SampleError, because
from megatron_g2rpo.data.fields import checked_fields

INDEX_NAME = "index.json"
INDEX_VERSION = 2
READABLE_VERSIONS = (1, 2)


class Member(NamedTuple):
    """The place of one file in a shard, in bytes, and the CRC-32 of its content; None in an index of version 1."""

    offset: int
    length: int
    crc32: int | None = None


@because("field")
def parse_fields(data: bytes, shard: str, key: str) -> dict[str, Any]:
    """Return the fields in the json of one sample, in the types of ``types.Sample`` (see ``fields.checked_fields``).

    Raises:
        SampleError: the data is not json or not an object, or a field is missing or of a type that cannot be meant; the
            message names shard, sample and field.
    """
    where = f"shard {shard}, sample {key!r}"
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # json's and utf-8's decode errors alike; nested too deep
        raise SampleError(f"{where}: broken json ({error})") from error
    if not isinstance(fields, dict):
        raise SampleError(f"{where}: the json must be an object, not {type(fields).__name__}")
    return checked_fields(fields, where)


def how_to_index(directory: Path) -> str:
    """Return the command that writes the index of a directory of shards, for error messages."""
    return f"python -m megatron_g2rpo.data.shard_writer {directory}"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
