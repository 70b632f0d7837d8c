# SPDX-License-Identifier: Apache-2.0
"""Claim: nemo-toolkit's section ``exp_manager`` means what it means there, or is refused with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe.exp_manager import FIELDS, Becomes, Rule, translate
from megatron_g2rpo.recipe.keys import dotted_keys
from megatron_g2rpo.recipe.schema import TrainRecipe
from tests.unit.recipe.conftest import Write

BASE = "defaults: vlm_g2rpo.yaml\nenv: {tasks: {ocr: {}}}\n"


def settings(**section: Any) -> dict[str, Any]:
    translation = translate(section)
    assert translation.faults == []
    return {key: setting.value for key, setting in translation.settings.items()}


def refusals(**section: Any) -> list[str]:
    return [fault.message for fault in translate(section).faults]


def failure(path: object, *overrides: str) -> list[str]:
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(path, list(overrides), "train")  # type: ignore[call-overload]
    return str(error.value).splitlines()[1:]


def keys_of(rules: dict[str, Rule] | Any) -> Iterator[str]:
    for rule in rules.values():
        if isinstance(rule, Becomes):
            yield rule.key
        elif isinstance(rule, dict):
            yield from keys_of(rule)


# Each as nemo_toolkit 3.0.0's get_log_dir puts it together where a run resumes.
@pytest.mark.parametrize(
    ("section", "log_dir"),
    [
        ({"exp_dir": "/runs", "name": "a", "version": "v1"}, "/runs/a/v1"),
        ({"exp_dir": "/runs", "name": "a"}, "/runs/a"),
        ({"exp_dir": "/runs"}, "/runs/default"),
        ({"name": "a"}, "nemo_experiments/a"),
        ({"exp_dir": None, "name": "a", "version": 3}, "nemo_experiments/a/3"),
        ({"exp_dir": "runs", "name": ""}, "runs/default"),
        ({"explicit_log_dir": "/runs/here", "name": None}, "/runs/here"),
        ({"explicit_log_dir": None, "exp_dir": None}, None),
    ],
)
def test_the_run_directory_is_nemo_toolkits(section: dict[str, Any], log_dir: str | None) -> None:
    assert settings(resume_if_exists=True, **section).get("logger.log_dir") == log_dir


def test_what_is_written_is_translated_and_nothing_else() -> None:
    assert settings(
        exp_dir="/runs",
        name="a",
        use_datetime_version=False,
        resume_if_exists=True,
        resume_past_end=True,
        resume_ignore_no_checkpoint=True,
        create_tensorboard_logger=False,
        create_wandb_logger=False,
        wandb_logger_kwargs={"project": "p", "name": "n"},
        create_checkpoint_callback=True,
        checkpoint_callback_params={
            "dirpath": "/checkpoints",
            "monitor": "val/mean_reward",
            "mode": "max",
            "save_top_k": 3,
            "save_last": True,
            "every_n_train_steps": 50,
            "every_n_epochs": None,
            "async_save": True,
            "save_nemo_on_train_end": False,
        },
        ema={"enable": False, "decay": 0.99},
        step_timing_kwargs={"reduction": "mean"},
        max_time_per_run="00:03:45:00",
        seconds_to_sleep=5,
    ) == {
        "logger.log_dir": "/runs/a",
        "logger.tensorboard_enabled": False,
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": "/checkpoints",
        "checkpointing.metric_name": "val/mean_reward",
        "checkpointing.higher_is_better": True,
        "checkpointing.keep_top_k": 3,
        "checkpointing.save_period": 50,
        "checkpointing.async_save": True,
        "checkpointing.export_hf": False,
        "checkpointing.checkpoint_must_save_by": "00:03:45:00",
    }
    assert settings() == {}
    assert settings(create_tensorboard_logger=None, max_time_per_run=None, checkpoint_callback_params=None) == {}


def test_minus_one_keeps_all_and_min_is_lower() -> None:
    params = {"save_top_k": -1, "monitor": "train/loss", "mode": "min"}
    assert settings(checkpoint_callback_params=params) == {
        "checkpointing.keep_top_k": None,
        "checkpointing.metric_name": "train/loss",
        "checkpointing.higher_is_better": False,
    }


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"create_wandb_logger": True}, "Weights & Biases is logger.wandb_enabled"),
        ({"create_mlflow_logger": True}, "MLflow is not supported yet"),
        ({"resume_if_exists": False}, "the same command always goes on"),
        ({"resume_ignore_no_checkpoint": False}, "a run without a checkpoint starts at its first step"),
        ({"resume_from_checkpoint": "/a/step_3"}, "policy.pretrained_checkpoint"),
        ({"summary_writer_kwargs": {"comment": "x"}}, "logger.log_dir/tensorboard"),
        ({"ema": {"enable": True}}, "no moving average of the weights"),
        ({"step_timing_kwargs": {"buffer_size": 5}}, "time/*"),
        ({"create_preemption_callback": False}, "always saves first"),
        ({"explicit_log_dir": "/a", "name": "b"}, "exp_manager.name would have no effect"),
        ({"exp_dir": ["/a"]}, "must be text, got ['/a'] (list)"),
        ({"ema": True}, "must be a mapping of fields, got True (bool)"),
        ({"max_time_per_run": 216000}, "'DD:HH:MM:SS' in quotes, got 216000 (int)"),
        ({"exp_dirs": "/a"}, "nemo-toolkit has no such field; nearest: exp_manager.exp_dir"),
        (
            {"checkpoint_callback_params": {"save_topk": 3}},
            "nearest: exp_manager.checkpoint_callback_params.save_top_k",
        ),
        ({"checkpoint_callback_params": {"save_last": False}}, "the newest checkpoint is always kept"),
        ({"checkpoint_callback_params": {"save_top_k": 0}}, "create_checkpoint_callback: false"),
        ({"checkpoint_callback_params": {"every_n_epochs": 1}}, "checkpointing.save_period"),
        ({"checkpoint_callback_params": {"filename": "{step}"}}, "step_N of checkpointing.checkpoint_dir"),
        ({"checkpoint_callback_params": {"monitor": "val/mean_reward"}}, "max or min (nemo-toolkit takes min)"),
        ({"checkpoint_callback_params": {"mode": "max"}}, "exp_manager.checkpoint_callback_params.monitor"),
        ({"checkpoint_callback_params": {"mode": "up", "monitor": "a"}}, "must be max or min, got 'up' (str)"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(section: dict[str, Any], says: str) -> None:
    (message,) = refusals(**section)
    assert says in message
    field = next(iter(section))
    assert message.startswith(f"exp_manager.{field}")


def test_a_truth_value_is_no_number() -> None:
    """``1 == True``: a run that should sleep a second, or keep all, must not pass for one that asks for nothing."""
    assert refusals(create_wandb_logger=0) != []
    assert refusals(checkpoint_callback_params={"save_last": 1}) != []
    assert refusals(checkpoint_callback_params={"every_n_epochs": False}) != []


def test_a_recipe_is_loaded_with_it(write: Write) -> None:
    text = """\
    exp_manager:
      exp_dir: ${oc.env:HOME}/runs
      name: seed-${grpo.seed}
      create_tensorboard_logger: false
      resume_if_exists: true
      checkpoint_callback_params: {every_n_train_steps: 7}
    """
    path = write("recipe.yaml", BASE + "\n".join(line[4:] for line in text.splitlines()))
    loaded = recipe.load(path, ["grpo.seed=5", "exp_manager.version=b"], "train")
    assert loaded.logger.log_dir.endswith("/runs/seed-5/b")
    assert not loaded.logger.tensorboard_enabled
    assert loaded.checkpointing.save_period == 7
    assert loaded.checkpointing.checkpoint_dir == f"{loaded.logger.log_dir}/checkpoints"
    assert "exp_manager" not in recipe.dump(loaded)


def test_other_keys_may_refer_to_it(write: Write) -> None:
    path = write("recipe.yaml", BASE + "exp_manager: {name: a}\ndata: {system_prompt: 'run ${exp_manager.name}'}\n")
    assert recipe.load(path, [], "train").data.system_prompt == "run a"


def test_it_leaves_the_run_what_it_is(write: Write) -> None:
    with_section = recipe.load(write("a.yaml", BASE + "exp_manager: {exp_dir: /runs, name: a}\n"), [], "train")
    without = recipe.load(write("b.yaml", BASE + "logger: {log_dir: /runs/a}\n"), [], "train")
    assert with_section == without


def test_two_names_for_one_setting_conflict_and_both_are_named(write: Write) -> None:
    """In one file, in one that is merged later, and by an override, which the message says how to give."""
    both = write(
        "both.yaml",
        BASE
        + "checkpointing: {save_period: 3}\nexp_manager:\n  exp_dir: e\n  name: a\n  max_time_per_run: '00:01:00:00'\n"
        "  checkpoint_callback_params:\n    every_n_train_steps: 3\n",
    )
    override = "checkpointing.checkpoint_must_save_by=null"
    start = "  one setting by two names, remove one of them, or give exp_manager."
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps"
    messages = [
        f"  one setting by two names, remove one of them, or give {every}=null to leave it to "
        f"checkpointing.save_period; set by {every} ({both}:9), checkpointing.save_period ({both}:3)",
        f"{start}max_time_per_run=null to leave it to checkpointing.checkpoint_must_save_by; set by "
        f"exp_manager.max_time_per_run ({both}:7), checkpointing.checkpoint_must_save_by (override '{override}')",
        f"{start}exp_dir=null exp_manager.name=null to leave it to logger.log_dir; set by "
        f"exp_manager.exp_dir ({both}:5), logger.log_dir (override 'logger.log_dir=/here')",
    ]
    assert sorted(failure(both, "logger.log_dir=/here", override)) == sorted(messages)
    fields = ("exp_dir", "name", "max_time_per_run", "checkpoint_callback_params.every_n_train_steps")
    off = [f"exp_manager.{name}=null" for name in fields]
    loaded = recipe.load(both, ["logger.log_dir=/here", override, *off], "train")
    assert (loaded.logger.log_dir, loaded.checkpointing.checkpoint_must_save_by) == ("/here", None)
    child = write("child.yaml", "defaults: both.yaml\ncheckpointing: {save_period: 4}\n")
    (later,) = failure(child)
    assert later.endswith(f"checkpointing.save_period ({child}:2)")
    section = write("section.yaml", BASE + "exp_manager: {exp_dir: /runs}\n")
    write("shared.yaml", "logger: {log_dir: old}\n")
    last = write("last.yaml", f"defaults: [{section.name}, shared.yaml]\nexp_manager: {{name: a}}\n")
    assert len(failure(last)) == 1  # it came after one of the fields


def test_an_inherited_value_gives_way_to_the_section(write: Write) -> None:
    """Shipped recipes name their run directory, and the section of a recipe over one of them says another."""
    shipped = Path(__file__).parents[3] / "examples/recipes/vlm_g2rpo-qwen3vl8b-4n8g-megatron-tp4.yaml"
    path = write("mine.yaml", f"defaults: {shipped}\nexp_manager: {{exp_dir: /runs, name: a}}\n")
    assert recipe.load(path, [], "train").logger.log_dir == "/runs/a"
    assert recipe.load(path, ["exp_manager.name=b"], "train").logger.log_dir == "/runs/b"
    assert recipe.load(shipped, ["exp_manager.name=b"], "train").logger.log_dir == "nemo_experiments/b"


def test_faults_are_listed_with_the_others_and_their_places(write: Write) -> None:
    path = write(
        "recipe.yaml",
        BASE + "grpo: {seeds: 1}\nexp_manager:\n  create_wandb_logger: true\n  create_tensorboard_logger: 1\n",
    )
    wandb, tensorboard, seed = failure(path)
    assert wandb.startswith(f"  {path}:5: exp_manager.create_wandb_logger: True (bool) has no meaning here: ")
    assert "unknown key 'grpo.seeds'" in seed
    assert tensorboard.startswith(f"  {path}:6: 'logger.tensorboard_enabled': ")


def test_a_section_that_is_no_mapping_is_refused(write: Write) -> None:
    assert failure(write("recipe.yaml", BASE + "exp_manager: [a]\n"))[0].endswith(
        "recipe.yaml:3: 'exp_manager' must be a mapping of fields, got ['a'] (list)"
    )
    assert recipe.load(write("none.yaml", BASE + "exp_manager: null\n"), [], "train").logger.log_dir


def test_what_a_field_becomes_is_a_key() -> None:
    assert set(keys_of(FIELDS)) <= set(dotted_keys(TrainRecipe))
