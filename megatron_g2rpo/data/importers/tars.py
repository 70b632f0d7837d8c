# SPDX-License-Identifier: Apache-2.0
"""Rows of webdataset tars, ours or others': the members of one key are one row."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers.values import Broken

_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
_TEXTS = ("txt", "text", "caption", "cls", "cls2", "id")


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield key and fields of every sample of one tar.

    The object in a member ``.json`` gives its fields; a member of text (``.txt``, ``.cls``, ...) is a field that is
    named by its suffix. Images are the field ``images``: those that the json's ``images`` name, else all in the order
    of their suffixes, ``0.png`` before ``10.png``.

    Raises:
        DataError: the file is no tar, or is damaged.
    """
    from webdataset.compat import WebDataset

    try:
        for sample in WebDataset([str(path.absolute())], shardshuffle=False, empty_check=False):
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            yield sample["__key__"], _fields(members)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a webdataset tar: {error}") from error


def _fields(members: dict[str, bytes]) -> Any:
    images = {name: data for name, data in members.items() if name.rpartition(".")[2].lower() in _IMAGES}
    fields: dict[str, Any] = {}
    try:
        for name, data in members.items():
            if name.rpartition(".")[2] in _TEXTS:
                fields[name] = data.decode("utf-8").strip()
        if "json" in members:
            content = json.loads(members["json"])
            if not isinstance(content, dict):
                return content
            fields.update(content)
    except ValueError as error:  # of json and utf-8 alike
        return Broken("a member is not valid JSON or UTF-8 text", error)
    named = fields.get("images")
    if images and isinstance(named, list) and named and all(name in images for name in named):
        fields["images"] = [images[name] for name in named]
    elif images:
        fields["images"] = [images[name] for name in sorted(images, key=_natural)]
    return fields


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
