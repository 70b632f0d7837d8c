# SPDX-License-Identifier: Apache-2.0
"""Claims: an evaluation goes on only as what it was, another one is refused by what differs, nothing is deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.eval.answers_file import ANSWERS, EvaluationError, append
from megatron_g2rpo.commands.eval.identity import claim, differences, fingerprint, identity_of, load
from megatron_g2rpo.weights.ownership import MARKER
from tests.common.recipes import G2RPO


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, directory / "model.safetensors")
    return directory


def identity(model: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    recipe = recipes.load(G2RPO, [f"policy.model_name={model}", *overrides], "train")
    tasks = tuple(recipe.env.tasks)
    arguments = {"data": "d1", "limit": None, "tasks": tasks, "sampling": {"temperature": 0.0, "samples": 1}}
    return identity_of(recipe, **{**arguments, **changes})


def test_a_model_is_its_content_not_its_place(model: Path) -> None:
    first = fingerprint(model)
    moved = model.rename(model.with_name("elsewhere"))
    (moved / "README.md").write_text("for people")
    assert fingerprint(moved) == first
    save_file({"w": torch.ones(2)}, moved / "model.safetensors")
    second = fingerprint(moved)
    (moved / "chat_template.jinja").write_text("")
    assert len({first, second, fingerprint(moved)}) == 3


def test_weights_that_are_not_the_models_do_not_count_nor_who_wrote_them(model: Path) -> None:
    first = fingerprint(model)
    (model / MARKER).write_text("{}")
    save_file({"w": torch.ones(2)}, model / "consolidated.safetensors")
    assert fingerprint(model) == first


def test_what_changes_an_answer_or_its_score_is_identity_and_speed_is_not(model: Path) -> None:
    base = identity(model)
    speed = ("policy.generation.batch_size=3", "cluster.gpus_per_node=2", "policy.generation.temperature=0.5")
    sampling = ("policy.generation.top_k=7", "policy.generation.stop_strings=[a]", "policy.generation.val_top_p=0.5")
    assert identity(model, *speed) == base
    assert identity(model, *sampling) == base, "how is sampled is told apart"
    task = next(iter(recipes.load(G2RPO, [], "train").env.tasks))
    for change in (
        "policy.generation.max_new_tokens=1500",
        "policy.precision=float32" if base["policy.precision"] == "bfloat16" else "policy.precision=bfloat16",
        "data.system_prompt=Hello",
        "data.max_pixels=4096",
        f"env.tasks.{task}.answer_format=exact",
        "env.reward_weights.format=0.7",
        "policy.generation.backend=vllm",
    ):
        (difference, *_) = differences(base, identity(model, change))
        assert change.partition("=")[0].removeprefix("data.") in difference
    assert differences(base, identity(model, data="d2")) == ["data.fingerprint: d1 there, d2 here"]
    assert differences(base, identity(model, limit=3)) == ["data.limit: None there, 3 here"]


def test_a_task_that_the_data_lacks_is_no_identity(model: Path) -> None:
    tasks = tuple(recipes.load(G2RPO, [], "train").env.tasks)
    assert identity(model, "env.tasks.other={}", tasks=tasks) == identity(model, tasks=tasks)


def test_a_users_file_is_identity_by_its_content(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("A = 1\n")
    first = identity(model, f"imports=[{file}]")
    file.write_text("A = 2\n")
    (difference,) = differences(first, identity(model, f"imports=[{file}]"))
    assert "mine.py" in difference


def test_an_evaluation_is_claimed_continued_refused_and_moved_aside(tmp_path: Path) -> None:
    out, first, second = tmp_path / "out", {"sampling.seed": 0, "a": 1}, {"sampling.seed": 3, "a": 1}
    claim(out, first, {"model": "m"}, fresh=False)
    claim(out, second, {"model": "m"}, fresh=False)  # nothing was answered yet
    append(out / ANSWERS, [{"key": "k"}])
    claim(out, second, {"model": "elsewhere"}, fresh=False)
    assert json.loads((out / "evaluation.json").read_text())["origin"] == {"model": "elsewhere"}
    with pytest.raises(EvaluationError, match=r"another evaluation \(sampling.seed: 3 there, 0 here\).*--fresh"):
        claim(out, first, {}, fresh=False)
    assert load(out) == second
    claim(out, first, {}, fresh=True)
    assert load(out) == first
    (aside,) = tmp_path.glob("out.*")
    assert (load(aside), (aside / ANSWERS).exists(), (out / ANSWERS).exists()) == (second, True, False)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(EvaluationError, match=r"holds files, but no evaluation.json"):
        claim(tmp_path, {}, {}, fresh=fresh)
    assert (tmp_path / "thesis.tex").exists()


def test_what_is_no_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="name the directory of an evaluation"):
        load(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(EvaluationError, match="not what an evaluation writes"):
        load(tmp_path)
