# SPDX-License-Identifier: Apache-2.0
"""Writing of webdataset shards and their index, in the format that ``shard_format`` describes.

``python -m megatron_g2rpo.data.shard_writer DIRECTORY`` writes the index of shards that another program has made; with
``--skip-bad``, samples that cannot be used are named and left out of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers.guess import advice_for
from megatron_g2rpo.data.shard_format import INDEX_NAME, INDEX_VERSION, Member, parse_fields
from megatron_g2rpo.data.shard_scan import scan_shard
from megatron_g2rpo.data.tar_members import tars_of


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
        if tars_of(self.directory):
            raise DataError(f"{self.directory} already holds shards: remove them, or write to another directory")
        self._per_shard = samples_per_shard
        self._written = 0
        self._shard: _Shard | None = None
        self._records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._close_shard()
        if kind is None:
            _write_index(self.directory, self._records)

    def write(
        self, key: str, fields: Mapping[str, Any], images: Sequence[bytes], suffix: str | Sequence[str] = "png"
    ) -> None:
        """Append one sample.

        Args:
            key: key of the sample, unique in its shard and without dots.
            fields: the fields of ``types.Sample`` except ``images``; further fields are kept (``Sample.extra``).
            images: encoded image files, in order.
            suffix: file type of all images, or a list with the type of each.

        Raises:
            DataError: the key contains a dot, or occurs in the shard already.
            SampleError: a field is missing or of a type that cannot be meant.
        """
        if "." in key:
            raise DataError(f"sample key {key!r} contains a dot, which webdataset takes for the end of the key")
        suffixes = [suffix] * len(images) if isinstance(suffix, str) else suffix
        names = [f"{i}.{each}" for i, each in enumerate(suffixes)]
        content = json.dumps({**fields, "images": names}, sort_keys=True).encode()
        if self._written % self._per_shard == 0:
            self._close_shard()
            self._shard = _Shard(self.directory / f"shard-{self._written // self._per_shard:06d}.tar")
        assert self._shard is not None  # the first sample opens it
        self._shard.add(key, [("json", content), *zip(names, images, strict=True)])
        self._written += 1

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._records.append(self._shard.close())
            self._shard = None


class _Shard:
    """One tar in the making, and its entry in the index: what ``shard_scan.scan_shard`` finds in it afterwards."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _HashedFile(path)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # closed by close
        self._samples: dict[str, dict[str, Any]] = {}
        self._formats: dict[str, set[str]] = {}

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample, whose first member is its json."""
        fields = parse_fields(members[0][1], self._path.name, key)
        if key in self._samples:
            raise DataError(f"shard {self._path.name}: the sample key {key!r} occurs twice; keys must be unique")
        places = {}
        for suffix, data in members:
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
            end = self._tar.offset - -len(data) % tarfile.BLOCKSIZE
            places[suffix] = Member(end - len(data), len(data), zlib.crc32(data))
        self._samples[key] = {"key": key, "task": fields["task"], "members": places}
        self._formats.setdefault(fields["task"], set()).add(fields["answer_format"])

    def close(self) -> dict[str, Any]:
        """Finish the tar, and return its entry in the index."""
        self._tar.close()
        self._file.close()
        return {
            "name": self._path.name,
            "bytes": self._file.size,
            "sha256": self._file.sha256.hexdigest(),
            "num_samples": len(self._samples),
            "tasks": dict(sorted(Counter(sample["task"] for sample in self._samples.values()).items())),
            "answer_formats": {task: sorted(names) for task, names in sorted(self._formats.items())},
            "samples": list(self._samples.values()),
        }


class _HashedFile(io.RawIOBase):
    """A file that is written from begin to end, with its size in bytes and its sha256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.size, self.sha256 = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def write_index(directory: str | Path, *, skip_bad: bool = False) -> Path:
    """Scan every ``*.tar`` of a directory and write its ``index.json``.

    A key may occur in several shards, as where each counts from 0: a sample's name has its shard in it.

    Args:
        directory: directory of the shards.
        skip_bad: leave samples that cannot be used out of the index, each with a warning, instead of raising.

    Returns:
        The path of the index.

    Raises:
        DataError: there are no shards or no samples, or a shard cannot be read.
        SampleError: a sample cannot be used, see ``shard_scan.scan_shard``.
    """
    directory = Path(directory)
    paths = tars_of(directory)
    if not paths:
        raise DataError(advice_for(directory))
    shards = [scan_shard(path, skip_bad=skip_bad) for path in paths]
    if not any(shard["num_samples"] for shard in shards):
        raise DataError(
            f"{directory}: its {len(paths)} shards hold no sample; a sample is a member KEY.json and its images "
            "KEY.0.png, KEY.1.jpg ..."
        )
    return _write_index(directory, shards)


def _write_index(directory: Path, shards: Sequence[Mapping[str, Any]]) -> Path:
    if not shards:
        raise DataError(advice_for(directory))
    index_path = directory / INDEX_NAME
    temporary = index_path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"version": INDEX_VERSION, "shards": shards}, separators=(",", ":")) + "\n")
    temporary.replace(index_path)
    return index_path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the index.json of a directory of webdataset shards.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--skip-bad", action="store_true", help="leave samples that cannot be used out, and name each")
    arguments = parser.parse_args()
    try:
        print(write_index(arguments.directory, skip_bad=arguments.skip_bad))
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
