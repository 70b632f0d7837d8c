# SPDX-License-Identifier: Apache-2.0
"""Claims: a request is a recipe of either kind or none, ranks are told the same request, and a policy is not built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_g2rpo.cli import measuring
from megatron_g2rpo.commands.eval.run import with_metrics
from megatron_g2rpo.commands.eval.settings import Request, completed
from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.recipe import SftRecipe, TrainRecipe
from megatron_g2rpo.rollout.base import Sampling
from tests.common.recipes import G2RPO, SFT
from tests.e2e.toy import call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "mine" / "hf"
    directory.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks, one of them with a name that is no word."""
    with ShardWriter(tmp_path / "shards", samples_per_shard=9) as writer:
        for number, task in enumerate(("math", "OCR: scene text")):
            fields = {"task": task, "question": "?", "answer": "1", "answer_format": "exact"}
            writer.write(f"s{number}", fields, [])
    return tmp_path / "shards"


@pytest.mark.parametrize(("path", "kind"), [(G2RPO, TrainRecipe), (SFT, SftRecipe)])
def test_recipes_of_both_kinds_are_evaluated(path: Path, kind: type, model: Path) -> None:
    settings = completed(Request(recipe=path, model=str(model)), [])
    assert isinstance(settings.recipe, kind)
    assert settings.recipe.policy.model_name == str(model)
    assert settings.sampling == Sampling(temperature=0.0)
    assert settings.out == Path("eval/mine-val"), "named after the run and the shards"


def test_without_a_recipe_the_tasks_are_those_of_the_data_and_the_precision_that_of_the_weights(
    model: Path, data: Path
) -> None:
    overrides = ("env.tasks.math.answer_format=numeric",)
    recipe = completed(Request(model=str(model), data=str(data), overrides=overrides), []).recipe
    assert set(recipe.env.tasks) == {"math", "OCR: scene text"}
    assert recipe.env.tasks["math"].answer_format == "numeric"
    assert recipe.policy.precision == "float32"


def test_data_brings_its_tasks_to_a_recipe_whose_own_keep_their_settings(model: Path, data: Path) -> None:
    plain = completed(Request(recipe=G2RPO, model=str(model)), []).recipe
    recipe = completed(Request(recipe=G2RPO, model=str(model), data=str(data)), []).recipe
    assert set(recipe.env.tasks) == {*plain.env.tasks, "math", "OCR: scene text"}
    assert all(recipe.env.tasks[task] == plain.env.tasks[task] for task in plain.env.tasks)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"samples": 4}, Sampling(temperature=0.6, top_p=0.9, top_k=20, stop_strings=("END",))),
        ({"samples": 4, "temperature": 0.8}, Sampling(temperature=0.8, top_p=0.9, top_k=20, stop_strings=("END",))),
        ({"samples": 1, "temperature": 0.8}, Sampling(temperature=0.8, top_p=0.9, top_k=20, stop_strings=("END",))),
        ({"samples": 1}, Sampling(temperature=0.0, stop_strings=("END",))),
        ({"samples": 1, "temperature": 0.0}, Sampling(temperature=0.0, stop_strings=("END",))),
    ],
)
def test_responses_are_sampled_as_in_the_recipes_validation(
    model: Path, options: dict[str, Any], sampling: Sampling
) -> None:
    keys = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "stop_strings": "[END]"}
    of_validation = tuple(f"policy.generation.val_{key}={value}" for key, value in keys.items())
    # Those of training say nothing here.
    overrides = (*of_validation, "policy.generation.top_k=7", "policy.generation.stop_strings=[STOP]")
    request = Request(recipe=G2RPO, model=str(model), overrides=overrides, **options)
    assert completed(request, []).sampling == sampling


def test_an_evaluation_of_several_datasets_is_named_after_all(model: Path) -> None:
    overrides = ("data.validation.path=[data/math/val, data/ocr/held_out]",)
    settings = completed(Request(recipe=G2RPO, model=str(model), overrides=overrides), [])
    assert settings.data == ("data/math/val", "data/ocr/held_out")
    assert settings.out == Path("eval/mine-val-held_out")


def test_vllm_must_be_able_to_decode_the_responses_to_a_prompt_together(model: Path) -> None:
    overrides = ("policy.generation.backend=vllm", "policy.generation.batch_size=16")
    request = Request(recipe=G2RPO, model=str(model), samples=17, overrides=overrides)
    with pytest.raises(ValueError, match=r"--samples 17: .*policy.generation.batch_size is 16; raise it"):
        completed(request, [])


def test_ranks_are_told_the_request_that_the_launcher_got(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(
        recipe=Path("r.yaml"), overrides=("a.b=1", "c=[x]"), model="m", data="d", out=Path("o"), limit=3, samples=4,
        temperature=0.5, seed=7, pass_thresholds=("0.5", "t=0.7"), compare=Path("e"), fresh=True,
    )  # fmt: skip
    told: list[Request] = []
    monkeypatch.setattr(measuring, "_evaluate", lambda request, nproc: told.append(request))
    for each in (request, Request(overrides=("a.b=1",), model="m", data="d"), Request(recipe=Path("r.yaml"))):
        assert call(*each.arguments()).exit_code == 0
    assert told == [request, Request(overrides=("a.b=1",), model="m", data="d"), Request(recipe=Path("r.yaml"))]


def test_accuracy_and_format_are_computed_also_where_a_recipe_does_not_weigh_them(model: Path) -> None:
    weights = "env.reward_weights={_override_: true, length: 0.1, accuracy: 0.4}"
    env = completed(Request(recipe=G2RPO, model=str(model), overrides=(weights,)), []).recipe.env
    assert list(with_metrics(env).reward_weights.items()) == [("length", 0.1), ("accuracy", 0.4), ("format", 0.0)]
