# SPDX-License-Identifier: Apache-2.0
"""Claims: a run directory belongs to one recipe; nothing of an earlier run is deleted or silently continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.run.directory import RunDirectoryError, prepare

MakeRecipe = Callable[..., TrainRecipe]


def begin(run: Path) -> None:
    """Leave what a run leaves after its first line."""
    (run / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_new_directory_is_claimed_with_a_recipe_that_loads(run: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("grpo.seed=3")
    prepare(recipe, fresh=False)
    assert recipes.load(run / "recipe.yaml", [], "train") == recipe


def test_the_same_run_may_change_its_length_and_layout(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run)
    longer = make_recipe("grpo.max_num_steps=999", "cluster.gpus_per_node=8")
    prepare(longer, fresh=False)
    assert recipes.load(run / "recipe.yaml", [], "train") == longer
    assert (run / "metrics.jsonl").exists()


def test_another_recipe_is_refused_with_the_keys_that_differ(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run)
    before = (run / "recipe.yaml").read_text()
    other = make_recipe("grpo.seed=3", "policy.model_name=other")
    with pytest.raises(RunDirectoryError, match=r"grpo\.seed: 42 there, 3 here; policy\.model_name: .* other here"):
        prepare(other, fresh=False)
    assert (run / "recipe.yaml").read_text() == before

    many = [f"env.reward_weights.{part}=0.5" for part in ("accuracy", "format", "structure", "length")]
    with pytest.raises(RunDirectoryError, match="and 1 more"):
        prepare(make_recipe(*many, "grpo.seed=3", "policy.model_name=other"), fresh=False)


def test_an_attempt_without_a_result_owns_nothing(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    prepare(make_recipe("grpo.seed=3"), fresh=False)
    begin(run)
    with pytest.raises(RunDirectoryError, match=r"grpo\.seed: 3 there, 42 here"):
        prepare(make_recipe(), fresh=False)


def test_a_checkpoint_is_a_result(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    (run / "checkpoints" / "step_2").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="belongs to another recipe"):
        prepare(make_recipe("grpo.seed=3"), fresh=False)


def test_a_directory_of_other_files_is_refused(run: Path, make_recipe: MakeRecipe) -> None:
    run.mkdir()
    (run / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        prepare(make_recipe(), fresh=False)


def test_fresh_moves_every_earlier_run_aside(run: Path, make_recipe: MakeRecipe) -> None:
    for seed in range(3):
        prepare(make_recipe(f"grpo.seed={seed}"), fresh=True)
        begin(run)
    aside = [path for path in run.parent.iterdir() if path != run]
    seeds = {recipes.load(path / "recipe.yaml", [], "train").grpo.seed for path in [*aside, run]}
    assert len(aside) == 2
    assert seeds == {0, 1, 2}
    assert all((path / "metrics.jsonl").exists() for path in aside)


def test_checkpoints_elsewhere_are_not_continued_by_a_new_run(
    tmp_path: Path, run: Path, make_recipe: MakeRecipe
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_4").mkdir(parents=True)
    recipe = make_recipe(f"checkpointing.checkpoint_dir={elsewhere}")
    with pytest.raises(RunDirectoryError, match=r"checkpointing\.checkpoint_dir: .*elsewhere holds checkpoints"):
        prepare(recipe, fresh=False)
    assert not run.exists()
    prepare(recipe, fresh=True)
    assert not elsewhere.exists()
    assert [path.name for path in tmp_path.glob("elsewhere.*/*")] == ["step_4"]
