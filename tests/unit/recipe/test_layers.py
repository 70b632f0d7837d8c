# SPDX-License-Identifier: Apache-2.0
"""Inheritance and overrides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_g2rpo.recipe.errors import RecipeError
from megatron_g2rpo.recipe.layers import EXEMPLARS, load_layers
from tests.unit.recipe.conftest import Write


def test_the_child_wins_and_mappings_merge(write: Write) -> None:
    write("parent.yaml", "a: {x: 1, y: [1, 2]}\nb: 3\n")
    child = write("child.yaml", "defaults: parent.yaml\na: {y: [9], z: 4}\n")
    assert load_layers(child).tree == {"a": {"x": 1, "y": [9], "z": 4}, "b": 3}


def test_parents_are_merged_depth_first_and_the_last_wins(write: Write) -> None:
    write("grandparent.yaml", "from_all: grandparent\nfrom_grandparent: 1\n")
    write("first.yaml", "defaults: grandparent.yaml\nfrom_all: first\nboth: first\n")
    # The second parent inherits from the same file as the first, so what that one changed is set back by it.
    write("second.yaml", "defaults: grandparent.yaml\nboth: second\n")
    child = write("child.yaml", "defaults: [first.yaml, second.yaml]\n")
    assert load_layers(child).tree == {"from_all": "grandparent", "from_grandparent": 1, "both": "second"}


def test_defaults_are_relative_to_the_file(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("base/parent.yaml", "defaults: ../other/top.yaml\na: 1\n")
    write("other/top.yaml", "b: 2\n")
    child = write("deep/down/child.yaml", "defaults: ../../base/parent.yaml\n")
    monkeypatch.chdir(tmp_path / "other")
    assert load_layers(Path(os.path.relpath(child))).tree == {"a": 1, "b": 2}


def test_an_exemplar_is_inherited_by_name_from_anywhere(write: Write) -> None:
    exemplar = load_layers(EXEMPLARS / "vlm_g2rpo.yaml").tree
    assert exemplar
    assert load_layers(write("far/away.yaml", "defaults: vlm_g2rpo.yaml\n")).tree == exemplar


def test_a_file_beside_the_recipe_comes_before_an_exemplar_of_that_name(write: Write) -> None:
    write("vlm_g2rpo.yaml", "own: 1\n")
    assert load_layers(write("child.yaml", "defaults: vlm_g2rpo.yaml\n")).tree == {"own": 1}


def test_override_marker_replaces_what_is_inherited(write: Write) -> None:
    write("parent.yaml", "env: {tasks: {a: {x: 1}, b: {x: 2}}, other: 3}\n")
    child = write("child.yaml", "defaults: parent.yaml\nenv: {tasks: {_override_: true, c: {x: 4}}}\n")
    document = load_layers(child)
    assert document.tree == {"env": {"tasks": {"c": {"x": 4}}, "other": 3}}
    assert sorted(document.origins) == ["env", "env.other", "env.tasks", "env.tasks.c", "env.tasks.c.x"]


def test_override_marker_in_one_of_several_parents_replaces_what_those_before_it_say(write: Write) -> None:
    write("base.yaml", "a: {x: 1}\nb: {x: 1, y: 2}\n")
    write("fragment.yaml", "a: {y: 2}\nb: {_override_: true, z: 3}\n")
    child = write("child.yaml", "defaults: [base.yaml, fragment.yaml]\nb: {w: 4}\n")
    assert load_layers(child).tree == {"a": {"x": 1, "y": 2}, "b": {"z": 3, "w": 4}}


def test_override_marker_without_a_parent_is_only_removed(write: Write) -> None:
    assert load_layers(write("a.yaml", "a: {_override_: true, x: 1}\nb: {_override_: false}\n")).tree == {
        "a": {"x": 1},
        "b": {},
    }


def test_override_marker_must_be_a_boolean(write: Write) -> None:
    path = write("a.yaml", "a:\n  _override_: 1\n")
    with pytest.raises(RecipeError, match=r"a\.yaml:2: a\._override_ must be true or false, got 1"):
        load_layers(path)


def test_a_key_is_traced_to_the_file_that_won(write: Write) -> None:
    parent = write("parent.yaml", "a:\n  x: 1\n  y: 2\n  m: {k: 1}\n")
    child = write("child.yaml", "defaults: parent.yaml\n\na:\n  y: 3\n  m: 4\n")
    origins = load_layers(child, ["a.z=5"]).origins
    assert str(origins["a.x"]) == f"{parent}:2"
    assert str(origins["a.y"]) == f"{child}:4"
    assert str(origins["a.z"]) == "override 'a.z=5'"
    assert "a.m.k" not in origins


def test_a_mapping_and_a_value_replace_each_other(write: Write) -> None:
    write("parent.yaml", "a: {x: 1}\nb: null\n")
    child = write("child.yaml", "defaults: parent.yaml\na: null\nb: {y: 2}\n")
    assert load_layers(child).tree == {"a": None, "b": {"y": 2}}


def test_a_cycle_of_defaults_is_an_error_that_shows_it(write: Write) -> None:
    a = write("a.yaml", "defaults: b.yaml\n")
    b = write("b.yaml", "x: 1\ndefaults: [a.yaml]\n")
    with pytest.raises(RecipeError) as error:
        load_layers(a)
    assert str(error.value) == f"{b}:2: defaults form a cycle: {a} -> {b} -> {a}"


def test_a_missing_parent_names_the_line_that_wants_it(write: Write, tmp_path: Path) -> None:
    child = write("child.yaml", "x: 1\ndefaults: gone.yaml\n")
    with pytest.raises(RecipeError) as error:
        load_layers(child)
    assert str(error.value) == f"{child}:2: defaults names {tmp_path / 'gone.yaml'}, which does not exist"


@pytest.mark.parametrize("defaults", ["3", "[a.yaml, 3]", "{a: b}", "['']"])
def test_defaults_must_be_paths(write: Write, defaults: str) -> None:
    path = write("child.yaml", f"defaults: {defaults}\n")
    with pytest.raises(RecipeError, match=r"child\.yaml:1: defaults must be a path or a list of paths"):
        load_layers(path)


def test_overrides_are_applied_in_order_and_merge_like_a_file(write: Write) -> None:
    path = write("recipe.yaml", "a: {x: 1, y: {z: 2}}\n")
    overrides = ["a.x=2", "a.x=7", "a.y={w: 3}", "b.c.d=a=b c", "b.e=${mul:2,3}"]
    assert load_layers(path, overrides).tree == {
        "a": {"x": 7, "y": {"z": 2, "w": 3}},
        "b": {"c": {"d": "a=b c"}, "e": "${mul:2,3}"},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("grpo..seed=3", "expected key=value"),
        ("--nproc=3", "expected key=value"),
        ("+grpo.seed=3", r"without '\+' or '~'"),
        ("~grpo.seed", r"without '\+' or '~'"),
        ("grpo.seed=", "no value given; write grpo.seed=null"),
        ("grpo.seed=[1", "not valid YAML"),
        ("grpo={seed: 1, seed: 2}", "key 'seed' is set twice"),
        ("grpo={1: 2}", "key 1 is not text"),
    ],
)
def test_a_malformed_override_is_named(write: Write, override: str, message: str) -> None:
    path = write("recipe.yaml", "grpo: {seed: 1}\n")
    with pytest.raises(RecipeError, match=message) as error:
        load_layers(path, [override])
    assert str(error.value).startswith(f"override '{override}': ")
