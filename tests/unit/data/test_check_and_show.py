# SPDX-License-Identifier: Apache-2.0
"""``data check`` finds what a run would stumble over, and ``data show`` shows what the model gets."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from megatron_g2rpo import cli
from megatron_g2rpo.commands.data_check import histogram
from megatron_g2rpo.data.pictures import pictures_of
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter
from tests.unit.data.conftest import break_image, make_fields, make_png


def call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path) -> Path:
    """A recipe for the small dataset's tasks, whose prompts may have 150 tokens."""
    path = tmp_path / "recipe.yaml"
    tree = {
        "defaults": "vlm_g2rpo.yaml",
        "policy": {
            "model_name": str(model_dir),
            "max_total_sequence_length": 250,
            "generation": {"max_new_tokens": 100},
        },
        "data": {"train": {"path": "unused"}, "validation": {"path": "unused"}},
        "env": {"tasks": {"math": {}, "ocr": {}, "vqa": {}}},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def write(directory: Path, samples: Sequence[tuple[dict, Sequence[bytes]]]) -> Path:
    with ShardWriter(directory) as writer:
        for number, (fields, images) in enumerate(samples):
            writer.write(f"{number:04d}", fields, images)
    return directory


def test_a_good_dataset_has_no_faults(dataset: Path, recipe: Path) -> None:
    code, output = call("check", dataset, recipe)
    assert code == 0, output
    assert "no faults" in output
    rows = {line.split()[1]: line.split() for line in output.splitlines() if line.startswith("│")}
    assert [rows[task][6] for task in ("math", "ocr", "vqa")] == ["5", "7", "12"]  # samples
    assert [rows[task][8] for task in ("math", "ocr", "vqa")] == ["4", "6", "12"]  # images: 0, 1, 2, 0, 1, 2...


def test_every_fault_is_named_and_makes_the_exit_status_1(tmp_path: Path, recipe: Path) -> None:
    data = write(
        tmp_path / "data",
        [
            (make_fields("math", 0), [make_png(0)]),
            (make_fields("math", 1), [b"\x89PNG\r\n\x1a\n broken"]),
            (make_fields("math", 2, answer="many", answer_format="numeric"), []),
            (make_fields("math", 3, answer_format="numric"), []),
            (make_fields("poetry", 4), []),
            (make_fields("ocr", 5, question="word " * 300), []),
        ],
    )
    faults = tmp_path / "faults.jsonl"
    code, output = call("check", data, recipe, "--out", faults)
    assert code == 1
    found = {(line["reason"], line["message"]) for line in map(json.loads, faults.read_text().splitlines())}
    for part, says in {
        "0001": "image",
        "0002": "'many' cannot be read",
        "0003": "did you mean 'numeric'",
        "poetry": "env.tasks",
        "0005": "more than the 150",
    }.items():
        assert any(part in message and says in message for _, message in found), (part, found)
    assert len(found) == 5
    assert "5 faults" in output


def test_a_reference_that_earns_less_than_1_against_itself_is_a_fault(tmp_path: Path) -> None:
    backwards = make_fields("math", 0, answer="[50, 50, 10, 10]", answer_format="box_iou")
    code, output = call("check", write(tmp_path / "data", [(backwards, [])]))
    assert code == 1
    assert "[50, 50, 10, 10]" in output


def test_a_changed_shard_is_a_fault(dataset: Path) -> None:
    break_image(dataset, "vqa", 1)
    code, output = call("check", dataset)
    assert code == 1
    assert "shard-00000" in output


def test_repeated_questions_and_shared_images_are_warnings(tmp_path: Path) -> None:
    same, other = make_fields("math", 0), make_fields("math", 0, answer="pink")
    data = write(tmp_path / "data", [(same, [make_png(1)]), (other, [make_png(1)]), (same, [make_png(2)])])
    held_out = write(tmp_path / "held-out", [(make_fields("math", 7), [make_png(2)])])
    code, output = call("check", data, "--validation", held_out)
    assert code == 0
    assert "2 samples ask the same" in output
    assert "2 samples ask the same and have different references" in output
    assert "1 images of" in output


def test_two_workers_find_what_one_finds(dataset: Path, recipe: Path) -> None:
    break_image(dataset, "vqa", 1)
    assert call("check", dataset, recipe, "--workers", "2") == call("check", dataset, recipe)


def test_a_histogram_marks_what_the_recipe_leaves_no_room_for() -> None:
    lines = histogram([10, 11, 12, 40], 30)
    assert sum(int(line.split("beyond")[0].split()[-1]) for line in lines) == 4
    assert [line for line in lines if "beyond the 30" in line] == [lines[-1]]
    assert histogram([5, 5], None) == [f"{5:>8} - {5:<8}{'#' * 40} 2"]


def test_pictures_are_what_the_model_gets(dataset: Path, processor: ChatProcessor) -> None:
    index = ShardIndex(dataset)
    sample = index.read(index.entries("vqa")[2])
    pictures = pictures_of(processor.encode_sample(sample, 0).inputs, processor)
    assert len(pictures) == 2
    # 32 x 32 is a size that the image processor leaves as it is.
    for picture, image in zip(pictures, sample.images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(image))


def test_the_page_holds_prompts_pictures_and_faults(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    break_image(dataset, "ocr", 1)
    page = tmp_path / "pages" / "page.html"
    code, output = call("show", dataset, recipe, "--out", page, "--limit", "3", "--task", "ocr")
    assert code == 0, output
    text = page.read_text()
    assert text.count("<article>") == 3
    assert text.count("<img ") == 2  # of ocr-2; that of ocr-1 is broken
    assert "What colour has thing 2 of ocr?" in text
    assert "the model gets 32 x 32, " in text
    assert 'class="fault"' in text
    assert "http" not in text  # nothing is loaded from elsewhere


def test_an_unknown_task_is_refused(dataset: Path, tmp_path: Path) -> None:
    code, output = call("show", dataset, "--task", "maths", "--out", tmp_path / "page.html")
    assert code == 1
    assert "it has math, ocr, vqa" in output
