# SPDX-License-Identifier: Apache-2.0
"""The format of a dataset: a directory of webdataset shards and one index.

A shard is plain webdataset: consecutive members ``<key>.json`` and ``<key>.<i>.png`` (or jpg, webp) form one sample;
the json holds the fields of ``types.Sample``, with ``images`` naming the image members in order, and whatever else
the maker adds (``Sample.extra``). The index records, per shard, its size in bytes, its sha256, where every member lies,
and the tasks with their answer formats: a reader can go to any sample without scanning a tar, and notices a missing,
truncated or exchanged shard, and an unknown task or answer format, before the first step.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.errors import SampleError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
REQUIRED_FIELDS = ("task", "question", "answer", "answer_format", "images")
# What the json is read for; everything else in it is the maker's own, and goes with the sample as ``extra``.
SAMPLE_FIELDS = (*REQUIRED_FIELDS, "response")


def split_member_name(name: str) -> tuple[str, str]:
    """Split ``dir/key.0.png`` into ``("dir/key", "0.png")``: in webdataset, a key ends at the file name's first dot."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix


def parse_fields(data: bytes, shard: str, key: str) -> dict[str, Any]:
    """Parse the json of one sample, and check that it has the required fields.

    Raises:
        SampleError: the data is not json or not an object, or a field is missing; the message names shard, sample and
            field.
    """
    where = f"shard {shard}, sample {key!r}"
    try:
        fields = json.loads(data)
    except ValueError as error:  # json's and utf-8's decode errors alike
        raise SampleError(f"{where}: broken json ({error})") from error
    if not isinstance(fields, dict):
        raise SampleError(f"{where}: the json must be an object, not {type(fields).__name__}")
    for name in REQUIRED_FIELDS:
        if name not in fields:
            raise SampleError(f"{where}: the json lacks the field {name!r}")
    return fields


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
