# SPDX-License-Identifier: Apache-2.0
"""Claims: a run directory belongs to one recipe; nothing of an earlier run is deleted or silently continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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


def test_what_an_error_advises_may_change_and_is_said_in_one_line(run: Path, make_recipe: MakeRecipe) -> None:
    assert prepare(make_recipe(), fresh=False) == []
    begin(run)
    advised = ("data.on_bad_sample=skip", "data.max_pixels=4096", "policy.max_total_sequence_length=8192")
    (line,) = prepare(make_recipe(*advised, "data.validation.path=elsewhere"), fresh=False)
    assert "data.on_bad_sample: error before, skip now" in line
    assert "policy.max_total_sequence_length: 4096 before, 8192 now" in line
    assert "data.validation.path: data/val before, elsewhere now" in line
    assert prepare(make_recipe(*advised, "data.validation.path=elsewhere"), fresh=False) == []


def test_an_identity_of_a_release_that_counted_these_keys_is_continued(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run)
    claimed = yaml.safe_load((run / "identity.yaml").read_text())
    claimed |= {"data.on_bad_sample": "error", "data.train.path": "elsewhere", "data.validation.path": "elsewhere"}
    (run / "identity.yaml").write_text(yaml.safe_dump(claimed))
    prepare(make_recipe("data.on_bad_sample=skip"), fresh=False)


def write_model(directory: Path, weights: bytes) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(300_000) + weights + bytes(300_000))
    return directory


def test_a_run_of_a_release_without_reward_options_is_continued_until_there_are_some(
    run: Path, make_recipe: MakeRecipe
) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run)
    theirs = yaml.safe_load((run / "identity.yaml").read_text())
    assert theirs.pop("env.reward_options") == {}
    (run / "identity.yaml").write_text(yaml.safe_dump(theirs))
    prepare(make_recipe(), fresh=False)
    (run / "identity.yaml").write_text(yaml.safe_dump(theirs))
    with pytest.raises(RunDirectoryError, match=r"env\.reward_options"):
        prepare(make_recipe("env.reward_options={judge: {model: m, addresses: [a]}}"), fresh=False)


def test_the_same_model_may_lie_elsewhere_and_another_may_not(
    run: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    first, copy, other = (
        write_model(tmp_path / name, weights) for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2"))
    )
    prepare(make_recipe(f"policy.model_name={first}"), fresh=False)
    begin(run)
    (line,) = prepare(make_recipe(f"policy.model_name={copy}"), fresh=False)
    assert f"policy.model_name: {first} before, {copy} now" in line
    for foreign in (other, "organisation/name"):
        with pytest.raises(RunDirectoryError, match=rf"policy\.model_name: {copy} there, {foreign} here"):
            prepare(make_recipe(f"policy.model_name={foreign}"), fresh=False)


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
