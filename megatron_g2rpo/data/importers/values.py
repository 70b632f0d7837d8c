# SPDX-License-Identifier: Apache-2.0
"""Values of a row as files have them: missing ones, nested ones, and images as bytes, paths or data URIs."""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from megatron_g2rpo.data.importers.base import Refusal


class Broken(NamedTuple):
    """What stands for the fields of a row that cannot be read: why, in general and in particular."""

    reason: str
    detail: object


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, or the NaN that pandas writes for one."""
    return value is None or (isinstance(value, float) and value != value)


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, ``reward_model.ground_truth``; None where there is none.

    A key that has the dots itself goes first. A part that is a whole number picks from a list: ``images.0``.
    """
    if path in record:
        return None if is_missing(record[path]) else record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return None if is_missing(value) else value


def images_of(value: Any, name: str) -> list[bytes | Path]:
    """Return the images that a value holds, in order: one or a list of paths, encoded files, or ``{bytes, path}``.

    A ``data:`` URI is decoded, and a ``file:`` URI is the path that it names.

    Raises:
        Refusal: a value is none of these, null beside others, or an address to download from.
    """
    if is_missing(value):
        return []
    if isinstance(value, str | bytes | Mapping):
        return [_image_of(value, name)]
    if isinstance(value, Sequence):
        missing = [is_missing(each) for each in value]
        if all(missing):  # what tables hold where a row has no image
            return []
        if any(missing):
            raise Refusal(name, "an image among others is null", f"number {missing.index(True) + 1} of {len(value)}")
        return [_image_of(each, name) for each in value]
    raise Refusal(name, "images are neither paths nor encoded files", repr(value)[:80])


def _image_of(value: Any, name: str) -> bytes | Path:
    if isinstance(value, Mapping):  # how Hugging Face datasets hold an image: the bytes, else the path
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Refusal(name, "images are neither paths nor encoded files", repr(value)[:80])
    if value.startswith("data:"):
        header, _, content = value.partition(",")
        try:
            return base64.b64decode(content, validate=True) if header.endswith(";base64") else b""
        except binascii.Error as error:
            raise Refusal(name, "a data URI of an image cannot be decoded", error) from error
    scheme = urlsplit(value).scheme if "://" in value else ""
    if scheme == "file":
        return Path(unquote(urlsplit(value).path))
    if scheme:
        raise Refusal(name, "images by address are not downloaded; fetch them, and name the files", value[:80])
    return Path(value)


def rest(record: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """Return the fields of a row that are kept as they are (``Sample.extra``): those that JSON can hold, with a value.

    Columns of bytes are left out: they belong to images, or to media that are not read.
    """
    kept = {key: plain(value) for key, value in record.items() if key not in used and not is_missing(value)}
    return {key: value for key, value in kept.items() if value is not None}


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: a date as its text, bytes and NaN as None, everything within alike."""
    if is_missing(value) or isinstance(value, bytes | bytearray):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) else str(value)
