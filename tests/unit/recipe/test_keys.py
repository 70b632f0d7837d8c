# SPDX-License-Identifier: Apache-2.0
"""Names are what people have: tasks with dots, slashes, blanks and digits, and paths with ~ and $HOME."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import RecipeError, TrainRecipe
from megatron_g2rpo.recipe.keys import dotted, is_text, split
from tests.common.recipes import G2RPO

NAMES = ["mathvista_v1.0", "hiyouga/geometry3k", "my data", "3d_boxes", "nvidia/x-v1.5 (clean)", "val", "a:b"]
NO_VALIDATION = ("grpo.val_period=0", "grpo.val_at_start=false", "grpo.val_at_end=false")


def load(*overrides: str) -> TrainRecipe:
    return recipes.load(G2RPO, list(overrides), "train")


def failure(*overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(*overrides)
    return str(error.value)


@pytest.mark.parametrize("parts", [["env", "tasks", name, "length"] for name in [*NAMES, "it's", 'a."b', '"']])
def test_a_dotted_key_can_be_split_again(parts: list[str]) -> None:
    assert split(dotted(*parts)) == parts


@pytest.mark.parametrize("name", NAMES)
def test_a_task_may_have_any_name_in_a_file_and_on_the_command_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"defaults: {G2RPO}\n"
        f"env: {{tasks: {{'{name}': {{answer_format: exact}}}}}}\n"
        f"data: {{task_weights: {{'{name}': 2}}}}\n"
    )
    recipe = recipes.load(file, [f'env.tasks."{name}".answer_format=numeric'], "train")
    assert recipe.env.tasks[name].answer_format == "numeric"
    assert recipe.data.task_weights == {name: 2.0}
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(recipes.dump(recipe))
    assert recipes.load(dumped, [], "train") == recipe
    assert dotted("env", "tasks", name, "answer_format") in recipes.identity(recipe)


def test_quotes_are_needed_for_dots_and_blanks_alone() -> None:
    assert load("env.tasks.hiyouga/geometry3k.answer_format=exact").env.tasks["hiyouga/geometry3k"]
    assert load("env.tasks.'v1.0'.answer_format=exact").env.tasks["v1.0"].answer_format == "exact"


def test_a_name_that_was_cut_at_its_dot_is_told_to_stand_in_quotes() -> None:
    message = failure('env.tasks."mathvista_v1.0"={}', "env.tasks.mathvista_v1.0.length=null")
    assert 'a name with a dot stands in quotes: env.tasks."mathvista_v1.0"' in message


def test_a_fault_under_such_a_name_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"defaults: {G2RPO}\nenv:\n  tasks:\n    v1.0:\n      answer_format: numric\n      lenght: null\n")
    with pytest.raises(RecipeError) as error:
        recipes.load(file, [], "train")
    assert f"{file}:5: env.tasks.\"v1.0\".answer_format: unknown answer format 'numric'" in str(error.value)
    assert f'{file}:6: unknown key \'env.tasks."v1.0".lenght\'; nearest valid key: env.tasks."v1.0".length' in str(
        error.value
    )


def test_another_key_with_a_dot_is_an_error_that_says_to_nest(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"defaults: {G2RPO}\ngrpo.seed: 3\n")
    with pytest.raises(RecipeError, match=r'recipe\.yaml:2: key "grpo\.seed" has a dot; nest the keys'):
        recipes.load(file, [], "train")


def test_an_interpolation_may_name_such_a_task() -> None:
    other = 'env.tasks.copy.answer_format=${env.tasks."v1.0".answer_format}'
    assert load('env.tasks."v1.0".answer_format=exact', other).env.tasks["copy"].answer_format == "exact"
    assert "names no key: env[tasks][v1.0]" in failure(other)
    assert "override 'env.tasks.\"v1.0\".length=${nope}'" in failure('env.tasks."v1.0".length=${nope}')


def test_home_and_environment_variables_are_expanded_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    recipe = load(
        "logger.log_dir=~/run", "policy.model_name=$SCRATCH/model", "data.validation.path=$HOME/val",
        "data.train.path=[~/a, {path: $SCRATCH/b, weight: 2}]", "data.system_prompt=pay $SCRATCH ~",
    )  # fmt: skip
    assert recipe.logger.log_dir == "/home/me/run"
    assert recipe.checkpointing.checkpoint_dir == "/home/me/run/checkpoints"
    assert recipe.policy.model_name == "/scratch/model"
    assert recipe.data.validation is not None
    assert recipe.data.validation.path == "/home/me/val"
    assert [part.path for part in recipe.data.train.parts] == ["/home/me/a", "/scratch/b"]
    assert recipe.data.system_prompt == "pay $SCRATCH ~"
    monkeypatch.delenv("SCRATCH")
    assert "'logger.log_dir': the environment variable SCRATCH of '$SCRATCH/run' is not set" in failure(
        "logger.log_dir=$SCRATCH/run"
    )


def test_home_is_expanded_in_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("imports=[~/mine.py]").imports[-1] == str(tmp_path / "mine.py")
    assert load("imports=[$HOME/mine.py]").imports[-1] == str(tmp_path / "mine.py")
    assert "the environment variable NOT_SET is not set here" in failure("imports=[$NOT_SET/mine.py]")


@pytest.mark.parametrize("text", ["Answer: yes or no", "yes", "3", "a # b", "@you", "- one", "%", "it's"])
def test_the_value_of_a_text_key_is_the_text(text: str) -> None:
    assert load(f"data.system_prompt={text}").data.system_prompt == text


def test_quotes_and_null_of_a_text_key_are_read_as_yaml() -> None:
    assert load("data.system_prompt='two  blanks: '").data.system_prompt == "two  blanks: "
    assert load("data.system_prompt=null").data.system_prompt is None
    assert not is_text(TrainRecipe, ["grpo", "seed"])
    assert not is_text(TrainRecipe, ["data", "train", "path"])
    assert is_text(TrainRecipe, ["env", "tasks", "any.thing", "answer_format"])


def test_an_environment_variable_as_a_number_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODES", "2")
    assert "write ${oc.decode:${oc.env:NODES}}" in failure("cluster.num_nodes=${oc.env:NODES}")
    assert load("cluster.num_nodes=${oc.decode:${oc.env:NODES}}").cluster.num_nodes == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("[]", "Input should be a path, or a list of paths or of {path: ..., weight: ...}"),
        ("3", "Input should be a path, or a list"),
        ("[a, '']", "entry 2: "),
        ("[{path: a, weight: 0}]", "entry 1: weight: Input should be greater than 0"),
        ("[{path: a, wieght: 2}]", "wieght: Extra inputs are not permitted"),
    ],
)
def test_what_names_no_dataset_is_a_fault(path: str, message: str) -> None:
    assert message in failure(f"data.train.path={path}")


def test_weights_are_for_training() -> None:
    assert "a weight says how often training draws" in failure("data.validation.path=[{path: a, weight: 2}]")
    assert load("data.validation.path=[a, b]").data.validation is not None


def test_without_validation_data_nothing_may_validate() -> None:
    assert load("data.validation=null", *NO_VALIDATION).data.validation is None
    message = failure("data.validation=null", *NO_VALIDATION[1:])
    assert "there is no data to validate on" in message
    assert "set grpo.val_period to 0 or false" in message
