# SPDX-License-Identifier: Apache-2.0
"""Claims: a run directory belongs to one recipe; nothing of an earlier run is deleted or silently continued."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.train.run.directory import claimed, joined
from megatron_g2rpo.train.run.lock import DirectoryInUseError, Lock
from megatron_g2rpo.train.run.metrics_file import MetricsFileError
from megatron_g2rpo.train.run.owners import RunDirectoryError, run_id
from tests.unit.train.run.directory_cases import MakeRecipe, begin, files, prepare, save


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
    assert not list(elsewhere.glob("step_*"))
    assert [path.name for path in tmp_path.glob("elsewhere.*/*")] == ["step_4"]


def test_a_second_run_is_refused_while_the_first_is_at_work_and_told_which(run: Path, make_recipe: MakeRecipe) -> None:
    """Also with ``--fresh``, and where only the checkpoints are shared."""
    with claimed(make_recipe(), fresh=False):
        begin(run)
        before = files(run.parent)
        who = rf"in use by run {run_id(run)} \(process {os.getpid()} on {re.escape(socket.gethostname())}, since 20"
        for fresh in (False, True):
            with pytest.raises(DirectoryInUseError, match=rf"^logger\.log_dir: .*{who}"):
                prepare(make_recipe(), fresh=fresh)
        sharing = make_recipe(
            f"logger.log_dir={run.parent / 'other'}", f"checkpointing.checkpoint_dir={run}/checkpoints"
        )
        for fresh in (False, True):
            with pytest.raises(DirectoryInUseError, match=rf"^checkpointing\.checkpoint_dir: .*{who}"):
                prepare(sharing, fresh=fresh)
        assert files(run.parent) == before
    prepare(make_recipe(), fresh=False)


def test_the_launcher_and_its_first_rank_hold_the_directory_until_both_have_ended(
    run: Path, make_recipe: MakeRecipe
) -> None:
    launcher, rank = ExitStack(), ExitStack()
    launcher.enter_context(claimed(make_recipe(), fresh=False))
    rank.enter_context(joined(make_recipe()))
    launcher.close()  # as if it were killed
    with pytest.raises(DirectoryInUseError):
        prepare(make_recipe(), fresh=False)
    rank.close()
    with claimed(make_recipe(), fresh=False) as notes:
        assert notes == []


def test_checkpoints_may_lie_in_the_run_directory_itself(run: Path, make_recipe: MakeRecipe) -> None:
    """One directory has one lock, which a process that takes it by two names would refuse itself."""
    recipe = make_recipe(f"checkpointing.checkpoint_dir={run}")
    with claimed(recipe, fresh=False), joined(recipe):
        begin(run)
        save(run, 1, run_id(run))
    prepare(recipe, fresh=False)
    prepare(recipe, fresh=True)
    assert not (run / "step_1").exists()


OWNER = """
import os, sys, time
from pathlib import Path
from megatron_g2rpo.train.run.lock import Lock
lock = Lock(Path(sys.argv[1]), "key")
if os.fork() == 0:
    print("held", flush=True)  # by the parent alone, now that this process runs
time.sleep(60)
"""


def test_a_dead_owner_keeps_no_lock_even_if_a_child_outlives_it(run: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(run)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryInUseError, match="another run, which has just started"):
            Lock(run, "key")
        owner.kill()
        owner.wait()
        Lock(run, "key").release()
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


def test_a_job_that_is_queued_again_waits_for_its_earlier_self(
    run: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = Lock(run, "logger.log_dir")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: earlier.release())
    with claimed(make_recipe(), fresh=False) as notes:
        assert notes == []


def test_a_file_system_without_locks_is_said_and_used(
    run: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    first, second = prepare(make_recipe(), fresh=False)
    assert "logger.log_dir: the file system of" in first
    assert "knows no locks (Function not implemented)" in first
    assert "checkpointing.checkpoint_dir" in second


def test_checkpoints_of_another_run_are_neither_continued_nor_moved(run: Path, make_recipe: MakeRecipe) -> None:
    theirs = run.parent / "theirs" / "checkpoints"
    save(theirs, 4, "0123abcd")
    prepare(make_recipe(), fresh=False)
    begin(run, 2)
    save(run / "checkpoints", 2, run_id(run))
    before = files(run.parent)
    pointed = make_recipe(f"checkpointing.checkpoint_dir={theirs}")
    with pytest.raises(RunDirectoryError, match=rf"of run 0123abcd \(step_4\), and .* belongs to run {run_id(run)}"):
        prepare(pointed, fresh=False)
    with pytest.raises(RunDirectoryError, match=r"of run 0123abcd, which is not that of .*left where it is"):
        prepare(pointed, fresh=True)
    new = make_recipe(f"logger.log_dir={run.parent / 'new'}", f"checkpointing.checkpoint_dir={theirs}")
    with pytest.raises(RunDirectoryError, match=r"name another for either \(they are those of run 0123abcd\)$"):
        prepare(new, fresh=False)
    assert files(run.parent) == before
    prepare(make_recipe(), fresh=False)


def test_fresh_moves_nothing_that_is_no_run(run: Path, make_recipe: MakeRecipe) -> None:
    run.mkdir()
    (run / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="not a run directory, and is left"):
        prepare(make_recipe(), fresh=True)
    scratch = run.parent / "scratch"
    (scratch / "step_2").mkdir(parents=True)
    (scratch / "data.tar").write_text("")
    other = make_recipe(f"logger.log_dir={run.parent / 'new'}", f"checkpointing.checkpoint_dir={scratch}")
    with pytest.raises(RunDirectoryError, match=r"holds more than checkpoints \(data\.tar\)"):
        prepare(other, fresh=True)
    assert {path.name for path in run.parent.rglob("*")} == {"run", "thesis.tex", "scratch", "step_2", "data.tar"}


def test_without_checkpoints_a_run_with_results_is_not_started_over(run: Path, make_recipe: MakeRecipe) -> None:
    disabled = make_recipe("checkpointing.enabled=false")
    prepare(disabled, fresh=False)
    begin(run)  # a validation alone may be made again
    prepare(disabled, fresh=False)
    begin(run, 3)
    with pytest.raises(RunDirectoryError, match=r"holds 3 steps of a run, which .* Pass --fresh to move them aside$"):
        prepare(disabled, fresh=False)
    save(run / "checkpoints", 2, run_id(run))
    with pytest.raises(RunDirectoryError, match=r"or go on from step 2 with checkpointing\.enabled=true"):
        prepare(disabled, fresh=False)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_starts_anew_says_so_and_not_because_its_checkpoints_are_elsewhere(
    run: Path, make_recipe: MakeRecipe
) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run, 3)
    (line,) = prepare(make_recipe(), fresh=False)
    assert line == "no checkpoint was saved: the run starts anew and takes its 3 logged steps again"
    save(run / "checkpoints", 2, run_id(run))
    with pytest.raises(RunDirectoryError, match=rf"holds no checkpoints, those of this run are in {run}/checkpoints"):
        prepare(make_recipe(f"checkpointing.checkpoint_dir={run}/new"), fresh=False)


@pytest.mark.parametrize("text", ["", "grpo.seed: [", "42", "\0\0\0"])
def test_damaged_files_of_a_run_are_named(run: Path, make_recipe: MakeRecipe, text: str) -> None:
    prepare(make_recipe(), fresh=False)
    begin(run, 1)
    intact = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text)
    assert f"{run}/recipe.yaml is damaged" in prepare(make_recipe(), fresh=False)[0]
    assert (run / "recipe.yaml").read_text() == intact
    (run / "identity.yaml").write_text(text)
    with pytest.raises(
        RunDirectoryError, match=rf"^{run}/identity\.yaml is damaged \(.*restore the file, or pass --fresh"
    ):
        prepare(make_recipe(), fresh=False)
    prepare(make_recipe(), fresh=True)


def test_a_damaged_line_of_metrics_is_named_before_anything_is_loaded(run: Path, make_recipe: MakeRecipe) -> None:
    prepare(make_recipe(), fresh=False)
    (run / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + bytes(20) + b"\n")
    with pytest.raises(MetricsFileError, match=rf"^{run}/metrics\.jsonl, line 2: .*remove the line"):
        prepare(make_recipe(), fresh=False)


def test_an_attempt_that_ended_before_its_claim_leaves_a_usable_directory(run: Path, make_recipe: MakeRecipe) -> None:
    (run / "checkpoints").mkdir(parents=True)
    for left in (".lock", "checkpoints/.lock", "identity.yaml.partial", "checkpoints/.writable-x1"):
        (run / left).write_text("")
    prepare(make_recipe(), fresh=False)
    assert run_id(run)
