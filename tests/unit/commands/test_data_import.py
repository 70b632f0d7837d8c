# SPDX-License-Identifier: Apache-2.0
"""``data import`` says what it has read and written, and its exit status whether that was all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from megatron_g2rpo.cli import app
from tests.common.launch import program

ROW = {"problem": "Which?", "answer": "red"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "import", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, {**ROW, "problem": "What?"}]))
    return path


def test_everything_imported_is_status_0_with_a_table_by_task(source: Path, tmp_path: Path) -> None:
    result = call(source, tmp_path / "out", "--task", "colour", "--answer-format", "exact")
    assert result.exit_code == 0, result.output
    assert result.stderr == "importer: easyr1\n"
    assert f"wrote 2 samples with 0 images to {tmp_path / 'out'}" in result.stdout
    assert [cell.strip() for cell in result.stdout.splitlines()[4].split("│")[1:4]] == ["colour", "exact", "2"]


def test_a_validation_part_is_a_directory_beside_the_training_part(source: Path, tmp_path: Path) -> None:
    result = call(source, tmp_path / "out", "--task", "t", "--answer-format", "exact", "--split", 0.5)
    assert result.exit_code == 0, result.output
    assert [cell.strip() for cell in result.stdout.splitlines()[4].split("│")[3:5]] == ["1", "1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]


def test_some_rejected_is_status_3_with_a_table_by_reason(source: Path, tmp_path: Path) -> None:
    source.write_text(json.dumps([ROW, {**ROW, "answer": None}]))
    arguments = (source, tmp_path / "out", "--task", "colour", "--answer-format", "exact")
    result = call(*arguments)
    assert result.exit_code == 3, result.output
    assert f"rejected rows: 1, listed in {tmp_path / 'out'}.rejected.jsonl" in result.stdout
    assert "no field 'answer'" in result.stdout
    strict = call(source, tmp_path / "strict", *arguments[2:], "--strict")
    assert strict.exit_code == 1
    assert "rows.json:2: no field 'answer'" in strict.stderr
    assert not (tmp_path / "strict").exists()


def test_nothing_imported_is_status_1_and_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    result = call(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "2 x no task; give --task NAME, or --task-field FIELD" in result.stderr


def test_mapped_fields_mean_the_importer_of_fields(source: Path, tmp_path: Path) -> None:
    maps = ("--map", "question=problem", "--map", "answer=answer")
    result = call(source, tmp_path / "out", *maps, "--task", "t", "--answer-format", "exact")
    assert result.exit_code == 0, result.output
    assert result.stderr == "importer: fields\n"
    wrong = call(source, tmp_path / "out2", *maps, "--importer", "easyr1")
    assert wrong.exit_code == 1
    assert "data importer 'easyr1' takes no option 'map'; it is an option of fields" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--importer", "easyr"), "--importer: unknown data importer 'easyr' (did you mean 'easyr1'?)"),
        (("--answer-format", "exat"), "--answer-format: unknown answer format 'exat' (did you mean 'exact'?)"),
        (("--split", "2"), "--split must be between 0 and 1"),
        (("system=drop",), "data importer 'easyr1' takes no option 'system'; it is an option of"),
        (("--image-dir", "nowhere"), "--image-dir: nowhere is no directory"),
    ],
)
def test_wrong_options_are_named_without_a_traceback(
    source: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = call(source, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_indexer_names_a_wrong_argument_without_a_traceback(source: Path) -> None:
    for argument in (source, source.parent / "nowhere", source.parent):
        done = program("megatron_g2rpo.data.shard_writer", str(argument))
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
