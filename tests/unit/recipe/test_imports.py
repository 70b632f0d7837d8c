# SPDX-License-Identifier: Apache-2.0
"""``imports``: a user's modules are there before names are checked, wherever the recipe is loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_g2rpo import recipe, registry
from megatron_g2rpo.recipe import EXEMPLARS
from tests.unit.recipe.conftest import Write

TASKS = "env:\n  tasks:\n    math: {}\n"
PLUGIN = """
from megatron_g2rpo.extend import answer_format

@answer_format("{name}")
def always(answer, sample):
    return 1.0
"""


def write_recipe(write: Write, name: str, imports: str, parent: str = "vlm_g2rpo.yaml", more: str = TASKS) -> Path:
    return write(name, f"defaults: {parent}\nimports: {imports}\n{more}")


def test_a_file_beside_the_recipe_is_imported_from_any_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("plugins/rewards.py", PLUGIN.format(name="beside"))
    path = write_recipe(write, "recipes/mine.yaml", "[../plugins/rewards.py]")
    monkeypatch.chdir("/")
    loaded = recipe.load(path, ["env.tasks.math.answer_format=beside"], "train")
    assert loaded.imports == (str(tmp_path / "plugins" / "rewards.py"),)
    assert "beside" in registry.answer_formats
    # Once a process, however often recipes are loaded.
    recipe.load(path, ["env.tasks.math.answer_format=beside"], "train")


def test_imports_of_parents_children_and_the_command_line_add_up(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("parent", "child", "typed"):
        write(f"{name}s/{name}.py", PLUGIN.format(name=f"of_the_{name}"))
    write_recipe(write, "parents/parent.yaml", "[parent.py]")
    path = write_recipe(write, "childs/child.yaml", "child.py", parent="../parents/parent.yaml")
    monkeypatch.chdir(tmp_path / "typeds")
    loaded = recipe.load(path, ["imports=[typed.py]", "env.tasks.math.answer_format=of_the_parent"], "train")
    assert [Path(entry).name for entry in loaded.imports] == ["parent.py", "child.py", "typed.py"]


def test_a_dotted_module_is_found_in_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a_package_of_mine/formats.py", PLUGIN.format(name="dotted"))
    path = write_recipe(write, "mine.yaml", "[a_package_of_mine.formats]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry != ""])
    assert recipe.load(path, ["env.tasks.math.answer_format=dotted"], "train").imports == ("a_package_of_mine.formats",)


def test_a_recipe_written_out_loads_again_from_elsewhere(write: Write, tmp_path: Path) -> None:
    write("plugins/rewards.py", PLUGIN.format(name="dumped"))
    path = write_recipe(write, "recipes/mine.yaml", "[../plugins/rewards.py]")
    loaded = recipe.load(path, ["env.tasks.math.answer_format=dumped"], "train")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "run" / "recipe.yaml", [], "train") == loaded


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("[missing.py]", r"mine\.yaml:2: imports names missing\.py: there is no file .*/missing\.py$"),
        ("[no_such_module_at_all]", r"mine\.yaml:2: imports: no_such_module_at_all cannot be imported: ModuleNotFound"),
        (
            "[broken.py]",
            r"mine\.yaml:2: imports: .*broken\.py cannot be imported: ZeroDivision.*broken\.py:2\)$",
        ),
        ("3", r"mine\.yaml:2: imports must be a list of dotted modules or \.py files, got 3$"),
        ("[[a.py]]", r"mine\.yaml:2: imports must be a list of dotted modules or \.py files"),
    ],
)
def test_an_import_that_fails_is_named_with_its_place(write: Write, imports: str, message: str) -> None:
    write("broken.py", "import math\nmath.pi / 0\n")
    path = write_recipe(write, "mine.yaml", imports)
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.load(path, [], "train")


def test_a_name_that_a_plugin_takes_from_the_package_is_an_error(write: Write) -> None:
    write("clash.py", PLUGIN.format(name="exact"))
    path = write_recipe(write, "mine.yaml", "[clash.py]")
    with pytest.raises(
        recipe.RecipeError, match=r"answer format 'exact' is registered twice: at .* and at .*clash\.py"
    ):
        recipe.load(path, [], "train")


def test_where_a_run_imports_from_is_not_what_it_is(write: Write) -> None:
    write("plugin.py", PLUGIN.format(name="moved"))
    path = write_recipe(write, "mine.yaml", "[plugin.py]")
    assert not any(key.startswith("imports") for key in recipe.identity(recipe.load(path, [], "train")))
    assert EXEMPLARS.is_dir()
