# SPDX-License-Identifier: Apache-2.0
"""Members of a tar of unknown origin: all of them or an error, and the samples that they belong to."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.fields import REQUIRED_FIELDS

# What packers leave in tars beside the files: macOS's doubles and folder settings, webdataset's folders of metadata.
_LEFT_BY_PACKERS = re.compile(r"(^|/)(\._[^/]*|\.DS_Store|__[^/]+__(/.*)?)$")
_JSON = ".json"


def tars_of(directory: Path, pattern: str = "*.tar") -> list[Path]:
    """Return the tars of a directory, sorted, without hidden files: macOS leaves ``._x.tar`` beside ``x.tar``."""
    return sorted(path for path in directory.glob(pattern) if path.suffix == ".tar" and not path.name.startswith("."))


def members_of(path: Path, file: BinaryIO) -> list[tarfile.TarInfo]:
    """Return the members of a tar, without its folders and what packers leave, after a check that they are all.

    At a header that it cannot read, ``tarfile`` stops as it does at the end of the archive.

    Args:
        path: path of the tar, for error messages.
        file: the tar, open for reading.

    Raises:
        DataError: the file is no tar, is damaged, ends early, or goes on after its end.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if not member.isdir()]
            end = tar.offset
    except Exception as error:  # TarError, OSError, and what impossible numbers in a header raise
        raise DataError(f"{path}: not a readable tar shard ({error}); copy or pack it again") from error
    file.seek(end)
    rest = file.read(tarfile.BLOCKSIZE)
    if not rest:
        raise DataError(
            f"{path}: ends at byte {end} after a member, without the zeros that end a tar: the rest was cut off; "
            "copy or pack it again"
        )
    if rest.strip(b"\0"):
        raise DataError(f"{path}: damaged at byte {end}, where a member should begin; copy or pack it again")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(
                f"{path}: holds more after the zeros at byte {end} that end a tar; unpack it (tar --ignore-zeros, "
                "where tars were joined by cat), and pack it again"
            )
    return [member for member in members if not _LEFT_BY_PACKERS.search(member.name)]


def keys_of(members: Sequence[tarfile.TarInfo], file: BinaryIO) -> set[str]:
    """Return the keys of all samples that have a json: names of json members without suffix.

    Of ``a.json`` and ``a.more.json``, the second is no sample but a member of the first if it has no field of a sample.
    """
    jsons = {m.name[: -len(_JSON)]: m for m in members if m.name.lower().endswith(_JSON)}
    keys = {key for key in jsons if key.rpartition("/")[2]}
    inner = {key for key in keys if key_of(key, keys) is not None}
    return keys - {key for key in inner if not _has_fields(jsons[key], file)}


def key_of(name: str, keys: Collection[str]) -> str | None:
    """Return the longest key that a member's name begins with, followed by a dot; None for a member of no sample."""
    start, end = name.rfind("/") + 1, len(name)
    while (end := name.rfind(".", start, end)) > start:
        if name[:end] in keys:
            return name[:end]
    return None


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the content of a member stands in the tar as it is: it is no link, device or sparse file."""
    return member.isreg() and not member.issparse()


def content_of(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    """Return the content of a plain member."""
    file.seek(member.offset_data)
    return file.read(member.size)


def _has_fields(member: tarfile.TarInfo, file: BinaryIO) -> bool:
    """Whether a json has a field of a sample, or cannot be read, which is to be found when it is read as one."""
    if not is_plain(member):
        return True
    try:
        fields = json.loads(content_of(member, file))
    except (ValueError, RecursionError):
        return True
    return isinstance(fields, dict) and any(name in fields for name in REQUIRED_FIELDS)
