# SPDX-License-Identifier: Apache-2.0
"""Importing: shards appear whole or not at all, and a sample that can't be imported is named with its line."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.importers.base import import_dataset
from megatron_g2rpo.data.shard_index import ShardIndex

GOOD = {"task": "colour", "question": "Which?", "answer": "red", "answer_format": "exact"}


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write(directory: Path, *samples: dict[str, Any] | str) -> Path:
    path = directory / "lines.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in samples))
    return path


def run(source: Path, target: Path, **options: Any) -> int:
    return import_dataset(partial(registry.importers.get("jsonl"), **options), source, target)


def test_json_lines_become_shards_with_their_images_and_further_fields(tmp_path: Path) -> None:
    for form in ("png", "jpeg", "webp"):
        (tmp_path / f"picture.{form}").write_bytes(picture(form))
    images = ["picture.png", "picture.jpeg", "picture.webp"]
    source = write(tmp_path, {**GOOD, "images": images, "source": "mine"}, "", {**GOOD, "task": "sum"})
    assert run(source, tmp_path / "shards") == 2
    index = ShardIndex(tmp_path / "shards")
    assert index.tasks == ("colour", "sum")
    assert index.answer_formats == {"colour": ("exact",), "sum": ("exact",)}
    sample = index.read(index.entries("colour")[0])
    assert [image.size for image in sample.images] == [(8, 8)] * 3
    assert sample.extra == {"source": "mine"}


def test_the_field_of_the_images_is_an_option(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("png"))
    source = write(tmp_path, {**GOOD, "pictures": ["a.png"]})
    assert run(source, tmp_path / "shards", images="pictures") == 1
    index = ShardIndex(tmp_path / "shards")
    assert len(index.read(index.entries("colour")[0]).images) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"lines\.jsonl:2: not valid JSON"),
        ("[1]", r"lines\.jsonl:2: a line must be a JSON object, not list"),
        ({**GOOD, "answer": 3}, r"lines\.jsonl:2: the field 'answer' must be text .*, got 3; write numbers in quotes"),
        ({key: GOOD[key] for key in GOOD if key != "task"}, r"lines\.jsonl:2: the field 'task' must be .* is missing"),
        ({**GOOD, "question": ""}, r"lines\.jsonl:2: the field 'question' must be text that is not empty, got ''"),
        ({**GOOD, "images": "a.png"}, r"lines\.jsonl:2: field 'images' must be a list of image files, got 'a\.png'"),
        ({**GOOD, "image": "a.png"}, r"lines\.jsonl:2: there is a field 'image', but images are listed in 'images'"),
        ({**GOOD, "images": ["none.png"]}, r"lines\.jsonl:2: field 'images' must list image files: .*none\.png"),
        ({**GOOD, "images": ["lines.jsonl"]}, r"lines\.jsonl:2: an image is neither PNG, JPEG nor WebP"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_is_left(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    source = write(tmp_path, GOOD, line)
    before = set(tmp_path.iterdir())
    with pytest.raises(SampleError, match=message):
        run(source, tmp_path / "shards")
    assert set(tmp_path.iterdir()) == before


def test_a_source_without_samples_and_a_target_that_exists_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        run(write(tmp_path, ""), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    (tmp_path / "shards").mkdir()
    with pytest.raises(DataError, match="exists already"):
        run(write(tmp_path, GOOD), tmp_path / "shards")
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        run(tmp_path / "nowhere.jsonl", tmp_path / "other")
