# SPDX-License-Identifier: Apache-2.0
"""Rows of webdataset tars, ours or others': the members of one key are one row."""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_g2rpo.data.importers.values import Broken
from megatron_g2rpo.data.tar_members import content_of, is_plain, key_of, keys_of, members_of

_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
_TEXTS = ("txt", "text", "caption", "cls", "cls2", "id")
_BEFORE_FIRST_DOT = re.compile(r"((?:.*/)?[^./]+)\.", re.DOTALL)

_logger = logging.getLogger(__name__)


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield key and fields of every sample of one tar.

    A member belongs to the longest key that a json has, else to what stands before the first dot of its name, as in
    webdataset; the members of a key need not be neighbours. The object in a member ``.json`` gives the fields of a
    row; a member of text (``.txt``, ``.cls``, ...) is a field that is named by its suffix. Images are the field
    ``images``: those that the json's ``images`` name, else all in the order of their suffixes, ``0.png`` before
    ``10.png``. Members of which nothing is read, such as a README, are counted in a warning.

    The ``webdataset`` library is not used: it takes a tar that is cut or damaged for one that ends there.

    Raises:
        DataError: the file is no tar, is damaged, or ends early, which is found before the first row.
    """
    with path.open("rb") as file:
        members = members_of(path, file)
        keys = keys_of(members, file)
        samples: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
        strays = []
        for member in members:
            key = key_of(member.name, keys) or _key_before_first_dot(member.name)
            suffix = "" if key is None else member.name[len(key) + 1 :].lower()
            if key is None or _kind(suffix) is None:
                strays.append(member.name)
            else:
                samples.setdefault(key, []).append((suffix, member))
        if strays:
            _logger.warning("%s: %d members are not read, such as %s", path, len(strays), ", ".join(strays[:5]))
        for key, parts in samples.items():
            yield key, _fields(parts, file)


def _key_before_first_dot(name: str) -> str | None:
    found = _BEFORE_FIRST_DOT.match(name)
    return None if found is None else found[1]


def _kind(suffix: str) -> str | None:
    """Return what is read of a member: ``json``, ``image``, ``text``, or None."""
    if suffix == "json":
        return "json"
    last = suffix.rpartition(".")[2]
    return "image" if last in _IMAGES else "text" if last in _TEXTS else None


def _fields(parts: Sequence[tuple[str, tarfile.TarInfo]], file: BinaryIO) -> Any:
    repeated = [suffix for suffix, count in Counter(suffix for suffix, _ in parts).items() if count > 1]
    if repeated:
        return Broken("a member occurs twice", repeated[0])
    if special := [suffix for suffix, member in parts if not is_plain(member)]:
        return Broken("a member is a link, a device or stored sparsely; pack the files themselves", special[0])
    members = {suffix: content_of(member, file) for suffix, member in parts}
    images = {suffix: data for suffix, data in members.items() if _kind(suffix) == "image"}
    fields: dict[str, Any] = {}
    try:
        for suffix, data in members.items():
            if _kind(suffix) == "text":
                fields[suffix] = data.decode("utf-8").strip()
        if "json" in members:
            content = json.loads(members["json"])
            if not isinstance(content, dict):
                return content
            fields.update(content)
    except (ValueError, RecursionError) as error:  # of json and utf-8 alike; nested too deep
        return Broken("a member is not valid JSON or UTF-8 text", error)
    if not images:
        return fields
    named = fields.get("images")
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    names = [name.lower() for name in named] if named and is_list else []
    found = [name for name in names if name in images]
    if found and len(found) < len(names):
        absent = next(name for name in names if name not in images)
        return Broken("the json names an image that the tar lacks", absent)
    fields["images"] = [images[name] for name in found or sorted(images, key=_natural)]
    return fields


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
