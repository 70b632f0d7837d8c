# SPDX-License-Identifier: Apache-2.0
"""Hand-made sources for tests of importing: tiny images, rows, and files of every kind that hold them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_g2rpo import registry
from megatron_g2rpo.data.importers.write import ImportResult, ImportSettings, import_dataset
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.types import Sample

# Answer formats of the paper's data, by its names.


def picture(shade: int = 200, form: str = "png") -> bytes:
    """An encoded image of one colour, told by its shade."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    """A file of a list, with NaN where a value is one, as pandas and the paper's files have it."""
    path.write_text(json.dumps(rows))
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines; text goes in as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def run(
    name: str, source: Path, target: Path, options: Mapping[str, Any] | None = None, **settings: Any
) -> ImportResult:
    """Import with an importer of the registry."""
    importer = partial(registry.importers.get(name), **(options or {}))
    return import_dataset(importer, source, target, ImportSettings(**settings))


def samples_of(target: Path) -> list[Sample]:
    """All samples of a dataset, in the order of their keys."""
    index = ShardIndex(target)
    return sorted((index.read(e) for task in index.tasks for e in index.entries(task)), key=lambda sample: sample.key)
