# SPDX-License-Identifier: Apache-2.0
"""Loading: what a user who made a mistake is told, and the two kinds of recipe."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe import EXEMPLARS
from tests.common.recipes import G2RPO, SFT
from tests.unit.recipe.conftest import Write


def failure(path: object, overrides: list[str] = [], kind: str = "train") -> str:  # noqa: B006 (read only)
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(path, overrides, kind)  # type: ignore[call-overload]
    return str(error.value)


def test_attributes_are_the_yaml_keys() -> None:
    loaded = recipe.load(G2RPO, ["env.tasks.ocr.length.end=300"], "train")
    assert loaded.policy.megatron_cfg.optimizer.lr == 2e-6
    assert loaded.grpo.adv_estimator.options["stages"] == ["group", "task"]
    assert loaded.env.tasks["ocr"].length is not None
    assert loaded.env.tasks["ocr"].length.end == 300
    assert loaded.checkpointing.checkpoint_dir == "runs/vlm_g2rpo/checkpoints"


def test_a_recipe_is_frozen() -> None:
    loaded = recipe.load(G2RPO, [], "train")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.grpo.seed = 3  # type: ignore[misc]


def test_derived_sizes() -> None:
    layout = ["cluster.num_nodes=2", "cluster.gpus_per_node=4", "policy.megatron_cfg.tensor_model_parallel_size=2"]
    loaded = recipe.load(G2RPO, [*layout, "policy.train_global_batch_size=256"], "train")
    assert (loaded.world_size, loaded.data_parallel_size) == (8, 4)
    assert (loaded.num_rollouts_per_step, loaded.num_updates_per_step) == (1024, 4)


def test_an_unknown_key_names_its_file_line_and_the_nearest_key(write: Write) -> None:
    parent = write("parent.yaml", f"defaults: {G2RPO}\ngrpo:\n  max_num_step: 3\n")
    child = write("child.yaml", "defaults: parent.yaml\ngrpo: {seed: 7}\n")
    message = failure(child)
    assert message.splitlines() == [
        f"recipe {child} cannot be used for train:",
        f"  {parent}:3: unknown key 'grpo.max_num_step'; nearest valid key: grpo.max_num_steps",
    ]


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("grpo.max_num_step=3", "grpo.max_num_steps"),
        ("polcy.precision=3", "policy"),
        ("policy.lr=3", "policy.megatron_cfg.optimizer.lr"),
        ("policy.megatron_cfg.tensor_parallel_size=2", "policy.megatron_cfg.tensor_model_parallel_size"),
        ("env.tasks.ocr.lenght=null", "env.tasks.ocr.length"),
        ("env.tasks.ocr.length.peak_strt=3", "env.tasks.ocr.length.peak_start"),
        ("grpo.val_temperature=0.7", "policy.generation.val_temperature"),
        ("checkpointing.keep_latest_k=2", "checkpointing.keep_top_k"),  # the name it had up to 0.4
        ("zzz=1", None),
    ],
)
def test_an_unknown_override_names_itself_and_the_nearest_key(override: str, nearest: str | None) -> None:
    key = override.partition("=")[0]
    unknown = key.split(".")[0] if nearest == "policy" else key
    message = failure(G2RPO, [override])
    assert f"override '{override}': unknown key '{unknown}'; nearest valid key: {nearest or ''}" in message


def test_all_faults_are_listed_at_once() -> None:
    message = failure(G2RPO, ["grpo.sed=3", "policy.precision=float8", "cluster.num_nodes=0"])
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.seed='3'", "'grpo.seed': Input should be a valid integer, got '3' (str)"),
        ("grpo.seed=3.0", "'grpo.seed': Input should be a valid integer, got 3.0 (float)"),
        ("grpo.seed=true", "'grpo.seed': Input should be a valid integer, got True (bool)"),
        ("grpo.seed=null", "'grpo.seed': Input should be a valid integer, got null"),
        ("grpo.val_at_start=1", "'grpo.val_at_start': Input should be a valid boolean, got 1 (int)"),
        ("policy.precision=fp8", "'policy.precision': Input should be 'float32' or 'bfloat16', got 'fp8' (str)"),
        ("policy.megatron_cfg=3", "'policy.megatron_cfg' must be a mapping of keys, got 3 (int)"),
        ("env.tasks=[ocr]", "'env.tasks' must be a mapping of keys, got ['ocr'] (list)"),
        ("loss_fn.ratio_clip_max=.inf", "'loss_fn.ratio_clip_max': Input should be a finite number, got inf (float)"),
    ],
)
def test_a_value_of_the_wrong_type_is_shown(override: str, message: str) -> None:
    assert f"override '{override}': {message}" in failure(G2RPO, [override])


def test_a_missing_key_is_named_with_the_file_that_should_have_it(write: Write) -> None:
    path = write("alone.yaml", "grpo:\n  seed: 1\n")
    message = failure(path)
    assert f"{path}:1: missing key 'grpo.max_num_steps'" in message
    assert "missing key 'policy'" in message
    assert "An exemplar (defaults: vlm_g2rpo.yaml or vlm_sft.yaml) holds every key" in message


def test_a_recipe_of_the_other_kind_is_refused() -> None:
    assert f"recipe {G2RPO} has a section 'grpo': it is for train, not for sft" in failure(G2RPO, kind="sft")
    assert f"recipe {SFT} has a section 'sft': it is for sft, not for train" in failure(SFT)


def test_an_sft_recipe_has_no_rl_sections() -> None:
    message = failure(SFT, ["loss_fn.name=ppo"], "sft")
    assert "override 'loss_fn.name=ppo': unknown key 'loss_fn'" in message


def test_a_conflict_names_every_key_and_where_it_was_set() -> None:
    message = failure(G2RPO, ["policy.train_global_batch_size=77"])
    assert "policy.train_global_batch_size (77) does not divide the 1024 rollouts of a step" in message
    assert "policy.train_global_batch_size (override 'policy.train_global_batch_size=77')" in message
    assert f"grpo.num_prompts_per_step ({EXEMPLARS / 'vlm_g2rpo.yaml'}:" in message
