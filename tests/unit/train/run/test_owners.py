# SPDX-License-Identifier: Apache-2.0
"""Claims: whatever its paths look like, no run goes on from, moves or begins in another's; none is begun twice."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_g2rpo.train.run.directory import claimed
from megatron_g2rpo.train.run.lock import DirectoryInUseError, Lock
from megatron_g2rpo.train.run.owners import RunDirectoryError, run_id
from megatron_g2rpo.train.run.saved_record import record_saved
from tests.unit.train.run.directory_cases import MakeRecipe, begin, files, prepare, save


def finish(run: Path, make_recipe: MakeRecipe, *overrides: str, steps: int = 4) -> str:
    """Leave what a run leaves that has saved its last step; its id."""
    recipe = make_recipe(f"logger.log_dir={run}", *overrides)
    prepare(recipe, fresh=False)
    begin(run, steps)
    save(Path(recipe.checkpointing.checkpoint_dir), steps, run_id(run))
    record_saved(run, steps)
    return run_id(run)


def test_a_way_through_a_directory_that_is_not_there_yet_leads_to_no_other_run(
    run: Path, make_recipe: MakeRecipe
) -> None:
    theirs = finish(run, make_recipe)
    before = files(run.parent)
    new = run.parent / "new"
    to_checkpoints = make_recipe(
        f"logger.log_dir={new}", "checkpointing.checkpoint_dir=${logger.log_dir}/../run/checkpoints"
    )
    with pytest.raises(RunDirectoryError, match=rf"those of run {theirs}"):
        prepare(to_checkpoints, fresh=False)
    with pytest.raises(RunDirectoryError, match=r"grpo\.seed: 42 there, 7 here"):
        prepare(make_recipe(f"logger.log_dir={new}/../run", "grpo.seed=7"), fresh=False)
    with Lock(run, "key"), pytest.raises(DirectoryInUseError):
        prepare(make_recipe(f"logger.log_dir={new}/../run"), fresh=False)
    assert files(run.parent) == before
    assert not new.exists()


def test_fresh_moves_checkpoints_that_only_seem_to_lie_in_the_run_directory(run: Path, make_recipe: MakeRecipe) -> None:
    elsewhere = f"checkpointing.checkpoint_dir={run}/../elsewhere"
    finish(run, make_recipe, elsewhere)
    prepare(make_recipe(elsewhere), fresh=True)
    assert not list((run.parent / "elsewhere").glob("step_*"))
    assert [path.name for path in run.parent.glob("elsewhere.*/step_*")] == ["step_4"]


def test_a_run_whose_checkpoints_were_removed_is_not_begun_again(run: Path, make_recipe: MakeRecipe) -> None:
    """Not even a step before its first period: a stop saves any."""
    finish(run, make_recipe, "grpo.max_num_steps=9", steps=3)
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_text()
    with pytest.raises(RunDirectoryError, match=r"holds no checkpoint, but the run had saved step_3: .* --fresh"):
        prepare(make_recipe(), fresh=False)
    assert (run / "metrics.jsonl").read_text() == metrics
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match="the run had saved step_3"):
        prepare(make_recipe(), fresh=False)
    prepare(make_recipe(), fresh=True)


def test_a_run_that_never_saved_is_begun_again_however_many_steps_it_logged(run: Path, make_recipe: MakeRecipe) -> None:
    """Negative of the test above: one that was killed, or met a full disk, while it saved its first checkpoint."""
    every = "checkpointing.save_period=2"
    prepare(make_recipe(every), fresh=False)
    begin(run, 3)
    assert prepare(make_recipe(every), fresh=False) == [
        "no checkpoint was saved: the run starts anew and takes its 3 logged steps again"
    ]


def test_a_checkpoint_that_was_about_to_be_replaced_is_one(run: Path, make_recipe: MakeRecipe) -> None:
    """Its job was killed between the two renames, and it is the only one."""
    finish(run, make_recipe)
    (run / "checkpoints" / "step_4").rename(run / "checkpoints" / "step_4.replaced")
    assert prepare(make_recipe(), fresh=False) == []


@pytest.mark.parametrize(("logged", "keys"), [(2, {}), (3, {"grpo": {"max_num_steps": 3}}), (1, None)])
def test_of_an_earlier_release_what_it_would_have_saved_is_missed(
    run: Path, make_recipe: MakeRecipe, logged: int, keys: dict[str, dict[str, int]] | None
) -> None:
    """It kept no record: by its period, its end, or without either."""
    prepare(make_recipe("checkpointing.save_period=2"), fresh=False)
    (run / ".saved").unlink()
    begin(run, 1)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    begin(run, logged)
    if keys is not None:
        recipe["grpo"] |= keys.get("grpo", {})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe) if keys is not None else "damaged")
    with pytest.raises(RunDirectoryError, match=rf"the run has logged {logged} steps, and will have saved one"):
        prepare(make_recipe(), fresh=False)
    begin(run, 1)
    if keys is not None:
        assert prepare(make_recipe(), fresh=False)[0].startswith("no checkpoint was saved")


def test_fresh_moves_no_directory_that_holds_another_run(run: Path, make_recipe: MakeRecipe) -> None:
    finish(run, make_recipe)
    with Lock(run / "inner", "key") as lock:
        lock.say("0123abcd")
        with pytest.raises(DirectoryInUseError, match=rf"{run}/inner, which lies in {run}, is in use by run 0123abcd"):
            prepare(make_recipe(), fresh=True)
    shutil.rmtree(run / "inner")
    finish(run / "inner", make_recipe)
    before = files(run.parent)
    with pytest.raises(RunDirectoryError, match=rf"{run} holds another run, {run}/inner, and is left where it is"):
        prepare(make_recipe(), fresh=True)
    assert files(run.parent) == before
    prepare(make_recipe(), fresh=False)


def test_fresh_moves_no_checkpoints_of_another_run_inside_the_run_directory(run: Path, make_recipe: MakeRecipe) -> None:
    finish(run, make_recipe)
    save(run / "checkpoints", 9, "0123abcd")
    with pytest.raises(RunDirectoryError, match=r"holds checkpoints of run 0123abcd, which is not that of"):
        prepare(make_recipe(), fresh=True)
    shutil.rmtree(run / "checkpoints" / "step_9")
    (run / "identity.yaml").write_text("")
    prepare(make_recipe(), fresh=True)  # whose the run is cannot be known, but it is one


def test_no_run_begins_in_the_directory_of_one_that_is_at_work(run: Path, make_recipe: MakeRecipe) -> None:
    inner = make_recipe(f"logger.log_dir={run}/new")
    with claimed(make_recipe(), fresh=False):
        for fresh in (False, True):
            with pytest.raises(
                DirectoryInUseError,
                match=rf"^logger\.log_dir: {run}/new lies in {run}, which is in use by run {run_id(run)}",
            ):
                prepare(inner, fresh=fresh)
    assert not (run / "new").exists()
    prepare(inner, fresh=False)


@pytest.mark.parametrize("count", ["", "x", "-1", "0", "\N{SUPERSCRIPT TWO}"])
def test_a_count_of_restarts_that_slurm_did_not_set_is_none(
    run: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    with Lock(run, "key"), pytest.raises(DirectoryInUseError, match=re.escape(str(run))):
        prepare(make_recipe(), fresh=False)


def test_a_manifest_that_cannot_be_read_and_names_that_no_run_gives_end_no_start(
    run: Path, make_recipe: MakeRecipe
) -> None:
    finish(run, make_recipe)
    (run / "checkpoints" / "step_5" / "manifest.json").mkdir(parents=True)
    for name in ("step_007", "step_\N{ARABIC-INDIC DIGIT THREE}", "step_best"):
        (run / "checkpoints" / name).mkdir()
    prepare(make_recipe(), fresh=False)
