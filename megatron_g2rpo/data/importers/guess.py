# SPDX-License-Identifier: Apache-2.0
"""What to say of a path that is no dataset of shards: most often data that was not imported yet."""

from __future__ import annotations

import difflib
from itertools import chain, islice
from pathlib import Path

from megatron_g2rpo.data.shard_format import INDEX_NAME, how_to_index

_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def advice_for(path: str | Path) -> str:
    """Return the message for a path where a dataset of shards with an index was expected: what it is, what to do."""
    path = Path(path)
    if not path.exists():
        guess = _nearest(path)
        return f"{path} does not exist; {guess}name a directory of shards, a glob of .tar files or one of them"
    if path.is_file():
        if path.suffix == ".tar":
            return _without_index(path.parent)
        return f"{path} is no .tar shard; make shards of it with: megatron-g2rpo data import {path} OUT"
    parts = sorted(each.name for each in path.iterdir() if (each / INDEX_NAME).is_file())
    if parts:
        return f"{path} holds no .tar shards, but the datasets {', '.join(parts)}; name one of them: {path / parts[0]}"
    found = islice(chain(path.glob("*"), path.glob("*/*")), 10_000)  # a folder of images may hold millions
    inside = [each for each in found if not each.name.startswith(".")]
    if any(each.suffix == ".tar" and each.parent == path for each in inside):
        return _without_index(path)
    if any(each.suffix.lower() in _ROWS for each in inside):
        return f"{path} holds no .tar shards; make some of it with: megatron-g2rpo data import {path} OUT"
    if any(each.suffix.lower() in _IMAGES for each in inside):
        return (
            f"{path} holds no .tar shards, and images without questions; write these in a file of JSON lines with "
            f"paths of the images, and import that: megatron-g2rpo data import FILE.jsonl OUT --image-dir {path}"
        )
    return f"{path} holds no .tar shards; make some with: megatron-g2rpo data import SOURCE OUT"


def _without_index(directory: Path) -> str:
    return (
        f"{directory / INDEX_NAME} does not exist; where the shards hold samples as this program writes them, write it "
        f"with: {how_to_index(directory)}; else import them: megatron-g2rpo data import {directory} OUT"
    )


def _nearest(path: Path) -> str:
    """Return the name beside a path that does not exist which is most like its own."""
    if not path.parent.is_dir():
        return ""
    names = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    return f"did you mean {path.with_name(names[0])}? If not, " if names else ""
