# SPDX-License-Identifier: Apache-2.0
"""Claims: what a user registers in a file of their own works in every process, and the documentation's code runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_g2rpo import registry
from megatron_g2rpo.recipe.imports import import_all
from tests.e2e.toy import ROOT, Toy, call, metrics, png

PLUGIN = ROOT / "examples" / "plugin"
EXTENDING = ROOT / "docs" / "extending.md"
# What the toy's recipe imports; in one document a list replaces the other.
OWN = [str(ROOT / "examples" / "quickstart" / "rewards.py")]
# What each block of the documentation registers.
NAMES = {
    "one_of": registry.answer_formats,
    "says_why": registry.reward_parts,
    "my_judge": registry.reward_parts,
    "hashes": registry.response_formats,
    "tempered_g2rpo": registry.estimators,
    "plain_policy_gradient": registry.surrogates,
    "counting": registry.engines,
    "tab_separated": registry.importers,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", EXTENDING.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of docs/extending.md as one file; one for all tests, because a name is registered once a process."""
    path = tmp_path_factory.mktemp("documented") / "documented.py"
    path.write_text("\n\n".join(blocks("python")))
    return path


def own_recipe(toy: Toy, path: Path, **changes: object) -> Path:
    """The toy's recipe with changes, and whatever it imports."""
    return toy.recipe(path, logger={"log_dir": str(path.parent / "run")}, **changes)


def test_every_seam_of_the_documentation_registers_and_trains(toy: Toy, documented: Path, tmp_path: Path) -> None:
    """One file outside of the package: a format, parts, an estimator and a surrogate with options, an engine."""
    env = {
        "reward_weights": {"says_why": 0.1, "my_judge": 0.2},
        "tasks": {"colour": {"answer_format": "one_of", "reward_weights": {"says_why": 0.3}}},
    }
    changes = {
        "imports": [*OWN, str(documented)],
        "env": env,
        "loss_fn": {"name": "plain_policy_gradient", "scale": 0.5},
        "grpo": {
            "max_num_steps": 2,
            "val_at_start": False,
            "val_at_end": False,
            "adv_estimator": {"_override_": True, "name": "tempered_g2rpo", "power": 0.7},
        },
        "policy": {"generation": {"backend": "counting", "backend_cfg": {"label": "prompts"}}},
        "checkpointing": {"export_hf": False},
    }
    result = call("train", own_recipe(toy, tmp_path / "recipe.yaml", **changes))
    assert result.exit_code == 0, result.output
    assert all(name in kind for name, kind in NAMES.items())
    lines = metrics(tmp_path / "run")
    assert lines[2]["train/my_judge"] > 0
    assert lines[2]["train/says_why"] == 0
    dumped = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert dumped["grpo"]["adv_estimator"] == {"name": "tempered_g2rpo", "power": 0.7}
    assert dumped["loss_fn"]["scale"] == 0.5


def test_a_response_format_of_ones_own_is_what_prompts_ask_for(toy: Toy, documented: Path) -> None:
    import_all([str(documented)], None)
    from megatron_g2rpo.tasks import response_formats

    form = response_formats.get("hashes")
    assert form.find_answer("because #### 7") == "7"
    assert form.find_thinking("because #### 7") == "because"
    assert form.is_well_formed("because #### 7")
    assert not form.is_well_formed("7")
    assert form.find_answer("7") is None


def test_an_importer_of_ones_own_writes_shards_that_train(toy: Toy, documented: Path, tmp_path: Path) -> None:
    source = tmp_path / "birds"
    source.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        (source / f"{number}.png").write_bytes(png(colour))
    lines = [f"What colour?\t{colour}\t{number}.png" for number, colour in enumerate(("red", "green", "blue"))]
    (source / "birds.tsv").write_text("\n".join(lines))
    arguments = ("data", "import", source / "birds.tsv", tmp_path / "shards", "--importer", "tab_separated")
    result = call(*arguments, "--imports", documented, "task=birds")
    assert result.exit_code == 0, result.output
    assert "wrote 3 samples" in result.output
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["shards"][0]["answer_formats"] == {"birds": ["exact"]}
    wrong = call(*arguments, "--imports", documented, "tsk=birds")
    assert wrong.exit_code == 1
    assert "data importer 'tab_separated' takes no option 'tsk' (did you mean 'task'?)" in wrong.output + wrong.stderr


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_recipes_of_the_documentation_are_recipes(block: str) -> None:
    assert isinstance(yaml.safe_load(block), dict)


# A judge that is asked again says something else: the ranks of a replica must not each ask it.
JUDGE = """
import os, random
from megatron_g2rpo.extend import reward_part

@reward_part("a_judge", batched=True)
def a_judge(samples, responses):
    with open("asked.txt", "a") as file:
        file.write(os.environ["RANK"] + "\\n")
    return [random.random() for _ in samples]
"""


def test_the_example_plugin_trains_from_another_directory_on_two_ranks(toy: Toy, tmp_path: Path) -> None:
    """`examples/plugin`, whose recipe names plugin.py beside it: two steps, tensor parallel 2, another directory."""
    (tmp_path / "a_judge.py").write_text(JUDGE)
    own = yaml.safe_load((PLUGIN / "recipe.yaml").read_text())
    changes = {
        "imports": [*OWN, str(PLUGIN / "plugin.py"), str(tmp_path / "a_judge.py")],
        "grpo": {
            "max_num_steps": 2,
            "val_at_start": False,
            "val_at_end": False,
            "adv_estimator": {"_override_": True, **own["grpo"]["adv_estimator"]},
        },
        "env": {
            "reward_weights": {**own["env"]["reward_weights"], "a_judge": 0.2},
            "tasks": {"sum": own["env"]["tasks"]["chart"]},
        },
        "policy": {"megatron_cfg": {"tensor_model_parallel_size": 2}},
        "checkpointing": {"export_hf": False},
    }
    recipe = own_recipe(toy, tmp_path / "recipes" / "recipe.yaml", **changes)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "megatron_g2rpo.cli", "train", str(recipe), "--nproc", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics(recipe.parent / "run")
    assert 0.0 <= lines[2]["train/no_repetition"] <= 1.0
    assert "train/sum/accuracy" in lines[2]
    assert 0.0 < lines[2]["train/a_judge"] < 1.0
    assert set((elsewhere / "asked.txt").read_text().split()) == {"0"}


def test_the_example_recipe_itself_loads_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_g2rpo import recipe

    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(PLUGIN / "recipe.yaml", [], "train")
    assert loaded.grpo.adv_estimator.options == {"limit": 1.5}
    assert loaded.env.tasks["chart"].answer_format == "within_ten_percent"
    assert [Path(entry).name for entry in loaded.imports] == ["rewards.py", "plugin.py"]
    assert list(loaded.env.reward_weights)[-1] == "no_repetition"
