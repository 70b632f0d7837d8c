# SPDX-License-Identifier: Apache-2.0
"""A small dataset, and the quickstart's untrained policy directory, built once for all tests of this folder."""

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter, write_index

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
TASK_SIZES = {"math": 5, "ocr": 7, "vqa": 12}
COLOURS = ("black", "blue", "green", "red")


def load_example(name: str) -> ModuleType:
    """A script of examples/quickstart as a module."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def make_png(seed: int, width: int = 32, height: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_fields(task: str, number: int, **more) -> dict:
    colour = COLOURS[number % len(COLOURS)]
    return {
        "task": task,
        "question": f"What colour has thing {number} of {task}?",
        "answer": colour,
        "answer_format": "exact",
        "response": f"<thinking>thing {number}</thinking><answer>{colour}</answer>",
    } | more


def write_dataset(directory: Path, sizes: dict[str, int] = TASK_SIZES, samples_per_shard: int = 9) -> Path:
    """Tasks in turn over the shards; sample ``<task>-<n>`` has n % 3 images."""
    rows = [(task, n) for task, size in sizes.items() for n in range(size)]
    rows.sort(key=lambda row: row[1])
    with ShardWriter(directory, samples_per_shard) as writer:
        for seed, (task, n) in enumerate(rows):
            writer.write(f"{task}-{n}", make_fields(task, n), [make_png(10 * seed + i) for i in range(n % 3)])
    return directory


def break_image(directory: Path, task: str, number: int) -> None:
    """Overwrite the first image of ``<task>-<number>`` inside its shard, and write the index again."""
    overwrite(ShardIndex(directory).entries(task)[number])
    write_index(directory)


def overwrite(entry: Entry) -> None:
    """Overwrite the first image of a sample inside its shard; sizes and offsets stay."""
    member = entry.members["0.png"]
    with entry.shard.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * member.length)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "shards")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """What build_policy.py writes, its tokenizer learned from the small dataset."""
    root = tmp_path_factory.mktemp("policy")
    write_dataset(root / "data" / "train")
    load_example("build_policy").build(root / "data", root / "model")
    return root / "model"


@pytest.fixture(scope="session")
def processor(model_dir):
    return ChatProcessor(model_dir)


def make_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(*parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


@pytest.fixture
def copied(model_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(model_dir, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def text_alone(copied):
    """The directory without what it sees with."""
    (copied / "preprocessor_config.json").unlink()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "qwen3"}))
    return copied
