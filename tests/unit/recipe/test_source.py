# SPDX-License-Identifier: Apache-2.0
"""Reading one YAML text: types, lines, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_g2rpo.recipe.errors import Origin, RecipeError
from megatron_g2rpo.recipe.source import read_document, read_value
from tests.unit.recipe.conftest import Write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("2.5e+3", 2500.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("true", True),
        ("null", None),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("'3'", "3"),
        ("2026-11-22", "2026-11-22"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("a=b", "a=b"),
        ("Qwen/Qwen3-VL", "Qwen/Qwen3-VL"),
    ],
)
def test_values_are_typed_alike_in_files_and_on_the_command_line(write: Write, text: str, value: object) -> None:
    in_file = read_document(write("recipe.yaml", f"key: {text}\n")).tree["key"]
    on_command_line = read_value(text, "key", f"key={text}").tree["key"]
    assert (in_file, type(in_file)) == (value, type(value))
    assert (on_command_line, type(on_command_line)) == (value, type(value))


def test_every_key_knows_its_line(write: Write) -> None:
    path = write("recipe.yaml", "a:\n  b: 1\n  c:\n    d: [1,\n      2]\ne: {f: 2}\n")
    origins = read_document(path).origins
    assert {key: origin.line for key, origin in origins.items()} == {
        "a": 1,
        "a.b": 2,
        "a.c": 3,
        "a.c.d": 4,
        "e": 6,
        "e.f": 6,
    }
    assert {origin.source for origin in origins.values()} == {str(path)}


def test_keys_of_an_override_name_the_override() -> None:
    document = read_value("{low: 0.1}", "env.entropy", "env.entropy={low: 0.1}")
    assert document.tree == {"env": {"entropy": {"low": 0.1}}}
    assert document.origins["env.entropy.low"] == Origin("env.entropy={low: 0.1}")


def test_an_empty_file_is_an_empty_recipe(write: Write) -> None:
    assert read_document(write("recipe.yaml", "# nothing yet\n")).tree == {}


def test_merge_keys_and_anchors_work(write: Write) -> None:
    path = write("recipe.yaml", "a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    assert read_document(path).tree["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1\n", 3, "not valid YAML"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: !!python/none x\n", 1, "not valid YAML"),
        ("a:\n  b: 1\n  b: 2\n", 3, "key 'b' is set twice"),
        ("a: 1\n2: 3\n", 2, "key 2 is not text"),
        ("a:\n  no: 3\n", 2, "key False is not text"),
        ("- a\n- b\n", 1, "a recipe is a mapping of sections"),
        ("a: &x\n  b: *x\n", 1, "an alias contains itself"),
    ],
)
def test_a_malformed_file_is_an_error_with_its_line(write: Write, text: str, line: int, message: str) -> None:
    path = write("recipe.yaml", text)
    with pytest.raises(RecipeError) as error:
        read_document(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read: No such file"):
        read_document(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"binary\.yaml cannot be read: .*utf-8"):
        read_document(path)


def test_a_control_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "control.yaml"
    path.write_bytes(b"a: \x01\n")
    with pytest.raises(RecipeError, match=r"control\.yaml: not valid YAML"):
        read_document(path)
