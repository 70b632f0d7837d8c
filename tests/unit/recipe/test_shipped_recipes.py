# SPDX-License-Identifier: Apache-2.0
"""The recipes under examples/recipes: they load, hold only differences, and are named after what they run on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe import EXEMPLARS
from megatron_g2rpo.recipe.layers import DEFAULTS, REPLACE, load_file, merge, parent_paths
from megatron_g2rpo.recipe.source import Document, read_document
from tests.common.openvlthinker import ROWS
from tests.common.recipes import G2RPO, SFT
from tests.unit.recipe.conftest import RECIPES, Write

MINIMAL = sorted(RECIPES.rglob("*.yaml"))
SHIPPED = sorted(RECIPES.glob("*.yaml"))
NAME = re.compile(
    r"(vlm_)?(?P<kind>g2rpo|sft)-(?P<model>[a-z0-9.]+)-(?P<nodes>\d+)n(?P<gpus>\d+)g-megatron-tp(?P<tp>\d+)(-[a-z0-9]+)*\.yaml"
)


def load(path: Path) -> recipe.Recipe:
    if path.name.removeprefix("vlm_").startswith("sft"):
        return recipe.load(path, [], "sft")
    return recipe.load(path, [], "train")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize(("name", "kind"), [("vlm_g2rpo", "train"), ("vlm_sft", "sft")])
def test_an_exemplar_lacks_nothing_but_tasks(name: str, kind: str) -> None:
    path = EXEMPLARS / f"{name}.yaml"
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(path, [], kind)  # type: ignore[call-overload]
    heading, fault = str(error.value).splitlines()
    assert heading == f"recipe {path} cannot be used for {kind}:"
    assert "'env.tasks': lists no task: write down those of your data" in fault
    assert "`my_task: {}` is enough" in fault


def test_policies_that_have_not_learnt_the_format_are_told_of_it() -> None:
    taught = {path.name for path in SHIPPED if not load(path).data.format_instruction}
    assert taught == {path.name for path in SHIPPED if "quickstart" in path.name or "smollm2" in path.name}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_named_after_what_it_runs_on(path: Path) -> None:
    match = NAME.fullmatch(path.name)
    assert match, "[vlm_]<g2rpo|sft>-<model>-<nodes>n<gpus>g-megatron-tp<size>[-modifiers].yaml"
    loaded = load(path)
    layout = loaded.policy.megatron_cfg
    assert (loaded.cluster.num_nodes, loaded.cluster.gpus_per_node, layout.tensor_model_parallel_size) == (
        int(match["nodes"]),
        int(match["gpus"]),
        int(match["tp"]),
    )


def repeated_keys(path: Path) -> list[str]:
    """Dotted keys that a file sets to the value that its parents give them already.

    A parent in a list counts too, against the parents before it.
    """
    own = read_document(path)
    parents = parent_paths(path, own)
    own.tree.pop(DEFAULTS, None)
    merged = Document({}, {})
    found: list[str] = []
    for parent in parents:
        # With its markers, which a merged one has no longer.
        top = load_file(parent) if DEFAULTS in read_document(parent).tree else read_document(parent)
        found += [f"{key} of {parent.name}" for key in _repeated(merged.tree, top.tree, "")]
        merged = merge(merged, top)
    return found + list(_repeated(merged.tree, own.tree, ""))


def _repeated(base: dict[str, Any], top: dict[str, Any], prefix: str) -> Iterator[str]:
    if top.get(REPLACE):
        return
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            yield from _repeated(below, value, f"{prefix}{key}.")
        elif key in base and below == value and type(below) is type(value):
            yield f"{prefix}{key}"


@pytest.mark.parametrize("path", MINIMAL, ids=lambda path: path.name)
def test_a_recipe_holds_only_differences(path: Path) -> None:
    assert repeated_keys(path) == []


def test_a_repeated_value_would_be_found(write: Write) -> None:
    write("base.yaml", "a: {x: 1, y: 2}\nb: {z: 3}\nc: 1\n")
    write("fragment.yaml", "a: {x: 5, y: 2}\n")
    child = write("child.yaml", "defaults: [base.yaml, fragment.yaml]\na: {x: 1}\nb: {_override_: true, z: 3}\nc: 1\n")
    assert repeated_keys(child) == ["a.y of fragment.yaml", "c"]


def test_the_exemplars_agree_but_for_their_loop() -> None:
    train = recipe.load(G2RPO, [], "train").model_dump()
    sft = recipe.load(SFT, [], "sft").model_dump()
    different = {key for key, value in flat(train).items() if key in flat(sft) and flat(sft)[key] != value}
    assert different == {
        "checkpointing.checkpoint_dir",
        "checkpointing.save_period",
        "policy.generation.vllm_server_cfg.weights_dir",
        "logger.log_dir",
        "policy.train_global_batch_size",
        "policy.megatron_cfg.optimizer.lr",
        "policy.megatron_cfg.scheduler.lr_warmup_steps",
        "policy.megatron_cfg.scheduler.lr_decay_style",
    }
    assert set(train) ^ set(sft) == {"grpo", "loss_fn", "sft"}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return leaves


def test_the_papers_run_has_the_papers_hyperparameters() -> None:
    paper = recipe.load(RECIPES / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml", [], "train")
    optimizer, generation = paper.policy.megatron_cfg.optimizer, paper.policy.generation
    assert paper.policy.model_name == "Qwen/Qwen3-VL-8B-Instruct"
    assert (paper.grpo.num_prompts_per_step, paper.grpo.num_generations_per_prompt) == (512, 8)
    assert paper.policy.train_global_batch_size == 128 * 8
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (2e-6, 0.01, 1.0)
    assert (generation.temperature, generation.max_new_tokens) == (1.0, 4096)
    assert (generation.val_temperature, generation.val_top_p) == (0.7, 0.95)
    assert paper.policy.max_total_sequence_length == 16384 + 4096
    assert paper.data.max_pixels == 1048576
    assert (paper.loss_fn.ratio_clip_min, paper.loss_fn.ratio_clip_max, paper.loss_fn.ratio_clip_c) == (0.2, 0.3, 3.0)
    assert paper.loss_fn.entropy_shaping.weight == 0.02
    rows = json.loads(ROWS.read_text())
    assert set(paper.env.tasks) == {row["task_type"] for row in rows}, "the names that its data carries"


def test_the_quickstart_is_one_run_at_every_layout() -> None:
    path = RECIPES / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
    one = recipe.load(path, [], "train")
    tensor = recipe.load(path, ["cluster.gpus_per_node=2", "policy.megatron_cfg.tensor_model_parallel_size=2"], "train")
    data = recipe.load(path, ["cluster.gpus_per_node=2"], "train")
    assert (one.data_parallel_size, tensor.data_parallel_size, data.data_parallel_size) == (1, 1, 2)
    assert recipe.fingerprint(one) == recipe.fingerprint(tensor) == recipe.fingerprint(data)
