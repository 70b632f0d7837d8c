# SPDX-License-Identifier: Apache-2.0
"""Writing of webdataset shards and their index, in the format that ``shard_format`` describes.

``python -m megatron_g2rpo.data.shard_writer DIRECTORY`` writes the index of shards that another program has made.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.importers.guess import advice_for
from megatron_g2rpo.data.shard_format import INDEX_NAME, INDEX_VERSION, parse_fields, sha256_of, split_member_name


class ShardWriter:
    """Writes samples to ``shard-000000.tar``, ``shard-000001.tar``, ... and the index at the end.

    The bytes written depend on the samples alone (no times, no user names), so that equal data has equal hashes.

    Args:
        directory: directory of the shards, created if necessary; it must not hold shards yet.
        samples_per_shard: number of samples after which a new shard begins.

    Raises:
        DataError: the directory already holds shards.
    """

    def __init__(self, directory: str | Path, samples_per_shard: int = 8192) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        if next(self.directory.glob("*.tar"), None) is not None:
            raise DataError(f"{self.directory} already holds shards: remove them, or write to another directory")
        self._per_shard = samples_per_shard
        self._written = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        if kind is None:
            write_index(self.directory)

    def write(
        self, key: str, fields: Mapping[str, Any], images: Sequence[bytes], suffix: str | Sequence[str] = "png"
    ) -> None:
        """Append one sample.

        Args:
            key: key of the sample, unique in the dataset and without dots.
            fields: the fields of ``types.Sample`` except ``images``; further fields are kept (``Sample.extra``).
            images: encoded image files, in order.
            suffix: file type of all images, or a list with the type of each.

        Raises:
            DataError: the key contains a dot.
        """
        if "." in key:
            raise DataError(f"sample key {key!r} contains a dot, which webdataset takes for the end of the key")
        suffixes = [suffix] * len(images) if isinstance(suffix, str) else suffix
        names = [f"{i}.{each}" for i, each in enumerate(suffixes)]
        record = json.dumps({**fields, "images": names}, sort_keys=True).encode()
        self._add(f"{key}.json", record, first=True)
        for name, data in zip(names, images, strict=True):
            self._add(f"{key}.{name}", data)
        self._written += 1

    def _add(self, name: str, data: bytes, first: bool = False) -> None:
        if first and self._written % self._per_shard == 0:
            if self._tar is not None:
                self._tar.close()
            path = self.directory / f"shard-{self._written // self._per_shard:06d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)  # closed by __exit__
        assert self._tar is not None  # the first member of the first sample opens it
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def write_index(directory: str | Path) -> Path:
    """Scan every ``*.tar`` of a directory and write its ``index.json``.

    Returns:
        The path of the index.

    Raises:
        DataError: there are no shards, a shard cannot be read, or a key occurs twice.
        SampleError: a sample has no json, lacks a field, or names an image that does not exist.
    """
    directory = Path(directory)
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise DataError(f"{directory} holds no .tar shards: {advice_for(directory)}")
    shards = [_scan_shard(path) for path in paths]
    repeated = [key for key, n in Counter(s["key"] for shard in shards for s in shard["samples"]).items() if n > 1]
    if repeated:
        raise DataError(f"{directory}: sample key {repeated[0]!r} occurs more than once; keys must be unique")
    index_path = directory / INDEX_NAME
    temporary = index_path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"version": INDEX_VERSION, "shards": shards}, separators=(",", ":")) + "\n")
    temporary.replace(index_path)
    return index_path


def _scan_shard(path: Path) -> dict[str, Any]:
    """Return the entry of one shard in the index; ``members`` maps suffix -> [offset in bytes, length in bytes]."""
    samples: dict[str, dict[str, Any]] = {}
    formats: dict[str, set[str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, suffix = split_member_name(member.name)
                sample = samples.setdefault(key, {"key": key, "task": None, "members": {}})
                sample["members"][suffix] = [member.offset_data, member.size]
                if suffix == "json":
                    stream = tar.extractfile(member)
                    assert stream is not None  # a regular file has one
                    fields = parse_fields(stream.read(), path.name, key)
                    sample["task"] = fields["task"]
                    formats.setdefault(fields["task"], set()).add(fields["answer_format"])
                    sample["images"] = fields["images"]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a readable tar shard ({error})") from error
    for key, sample in samples.items():
        if sample["task"] is None:
            raise SampleError(f"shard {path.name}, sample {key!r}: no .json member")
        missing = [name for name in sample.pop("images") if name not in sample["members"]]
        if missing:
            raise SampleError(f"shard {path.name}, sample {key!r}: names image {missing[0]!r}, which is not there")
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "num_samples": len(samples),
        "tasks": dict(sorted(Counter(sample["task"] for sample in samples.values()).items())),
        "answer_formats": {task: sorted(names) for task, names in sorted(formats.items())},
        "samples": list(samples.values()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the index.json of a directory of webdataset shards.")
    parser.add_argument("directory", type=Path)
    try:
        print(write_index(parser.parse_args().directory))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
