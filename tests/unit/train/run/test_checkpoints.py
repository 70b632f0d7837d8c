# SPDX-License-Identifier: Apache-2.0
"""Claims: a checkpoint is whole or absent, old ones go, and what was saved comes back to the last bit."""

from __future__ import annotations

import errno
import math
import multiprocessing
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_g2rpo.policy import sharded_state
from megatron_g2rpo.train.run import checkpoint_removal, checkpoint_writing
from megatron_g2rpo.train.run.checkpoint_writing import CheckpointWriteError
from megatron_g2rpo.train.run.checkpoints import Checkpoints, PolicyNotFinite
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import Manifest, faults, files_of, read_manifest, write_manifest
from tests.unit.train.run.checkpoint_cases import make_model, make_policy, names_in, step, weights_of


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("precision", "freeze_vision"),
    [("float32", False), ("bfloat16", False), ("float32", True)],
    ids=["fp32", "bf16", "frozen-vision"],
)
def test_a_restored_policy_takes_the_same_steps(
    model_dir: Path, tmp_path: Path, precision: str, freeze_vision: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    straight = make_policy(model_dir, precision, freeze_vision)
    step(straight)
    checkpoints.save(1, straight, {"stream": {"position": 6}})
    expected = [step(straight) for _ in range(2)]

    restored = make_policy(model_dir, precision, freeze_vision)
    assert checkpoints.load(1, restored) == {"step": 1, "stream": {"position": 6}}
    assert [step(restored) for _ in range(2)] == expected
    for (name, one), (_, other) in zip(straight.stream(), restored.stream(), strict=True):
        assert torch.equal(one, other), name


def test_weights_are_loaded_where_they_are(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate and up projections megatron-core would make a copy of both."""
    straight, fresh = make_policy(model_dir), make_policy(model_dir)
    step(straight)
    Checkpoints(tmp_path, None).save(1, straight, {})
    merge, in_place = sharded_state._merge, []

    def watched(parameter: torch.Tensor, *arguments: Any) -> torch.Tensor:
        merged = merge(parameter, *arguments)
        in_place.append(merged is parameter)
        return merged

    monkeypatch.setattr(sharded_state, "_merge", watched)
    with fresh.device.megatron():
        sharded_state.load_weights(fresh.model, tmp_path / "step_1", torch.float32)
    assert in_place == [True]  # one layer
    for (name, one), (_, other) in zip(straight.stream(), fresh.stream(), strict=True):
        assert torch.equal(one, other), name


def test_the_weights_alone_would_not_do(model_dir: Path, tmp_path: Path) -> None:
    """The negative of the test above: without the optimizer's moments the steps differ."""
    straight = make_policy(model_dir)
    step(straight)
    saved = weights_of(straight)
    expected = [step(straight) for _ in range(2)]
    fresh = make_policy(model_dir)
    fresh.load(saved, source="the policy after its first step")
    first, second = [step(fresh) for _ in range(2)]
    assert first == expected[0]
    assert second != expected[1]


def test_the_newest_are_kept_and_an_unfinished_one_does_not_count(model_dir: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention(keep_top_k=2))
    assert not checkpoints.has(2)
    policy = make_policy(model_dir)
    for number in (2, 9, 10):  # as text, 10 comes before 9
        (tmp_path / f"step_{number + 90}.partial").mkdir(parents=True)  # of a job that was killed
        checkpoints.save(number, policy, {})
        assert checkpoints.has(number)
    assert names_in(tmp_path) == ["step_10", "step_9"]


def test_a_save_leaves_no_process_behind(model_dir: Path, tmp_path: Path) -> None:
    """One that outlived a failed rank would hold its standard output open, and whoever reads that would wait."""
    before = set(multiprocessing.active_children())
    Checkpoints(tmp_path, None).save(1, make_policy(model_dir), {})
    assert set(multiprocessing.active_children()) <= before


def test_a_job_that_is_killed_while_it_removes_a_checkpoint_leaves_none_that_looks_damaged(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, checkpoints = make_policy(model_dir), Checkpoints(tmp_path, Retention(1))
    checkpoints.save(1, policy, {})

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, policy, {})
    assert names_in(tmp_path) == ["step_1.partial", "step_2"]
    Checkpoints(tmp_path, Retention(1)).save(3, policy, {})
    assert names_in(tmp_path) == ["step_3"]


def test_what_a_rank_of_a_killed_job_still_writes_is_removed_when_it_has_ended(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes into the directory while that is removed; this is what the file system then says."""
    (tmp_path / "step_1.partial").mkdir()
    remove, tries = shutil.rmtree, []

    def outlived(path: Path) -> None:
        tries.append(path)
        if len(tries) < 4:
            (path / f"__{len(tries)}_0.distcp").touch()
            path.rmdir()  # not empty
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", outlived)
    Checkpoints(tmp_path, run_id="mine").save(2, make_policy(model_dir), {})
    assert names_in(tmp_path) == ["step_2"]
    assert len(tries) == 4


def test_a_rank_of_a_killed_job_that_does_not_end_is_not_waited_for_for_ever(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the way of the step that it writes alone; for the others it is waited for once."""
    (tmp_path / "step_1.partial").mkdir()
    monkeypatch.setattr(checkpoint_removal, "_OUTLIVED_S", 0.5)
    monkeypatch.setattr(shutil, "rmtree", lambda path: (write_owner(path), path.rmdir()))
    policy, said = make_policy(model_dir), list[str]()
    checkpoints = Checkpoints(tmp_path, run_id="mine", note=said.append)
    checkpoints.save(2, policy, {})
    busy = rf"{tmp_path}/step_1\.partial cannot be removed, as another process writes"
    assert re.match(f"warning: {busy}", said[0])
    begun = time.monotonic()
    checkpoints._make_way(3, damaged=False)
    assert time.monotonic() - begun < 0.4
    with pytest.raises(CheckpointWriteError, match=busy):
        Checkpoints(tmp_path, run_id="mine").save(1, policy, {})
    assert names_in(tmp_path) == ["step_1.partial", "step_2"]


def write_owner(partial: Path) -> None:
    write_manifest(partial, Manifest(run_id="mine", step=1, version="0.5.0", metrics={}, files={}))


def test_what_cannot_be_removed_for_another_reason_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "step_1.partial").write_text("a file")
    with pytest.raises(NotADirectoryError):
        checkpoint_removal.remove_unfinished(tmp_path / "step_1.partial")


def test_a_checkpoint_that_cannot_be_removed_ends_no_run_and_is_named_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, said, unlink = make_policy(model_dir), list[str](), Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name.startswith("step_1.") and path.suffix == ".distcp":
            raise PermissionError(errno.EPERM, "Operation not permitted", path.name)
        unlink(path, missing_ok=missing_ok)

    checkpoints = Checkpoints(tmp_path, Retention(1), run_id="mine", note=said.append)
    checkpoints.save(1, policy, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        checkpoints.save(2, policy, {})
        checkpoints.save(3, policy, {})
    assert names_in(tmp_path) == ["step_1.partial", "step_3"]
    [line] = said
    assert re.match(
        rf"warning: {tmp_path}/step_1\.partial cannot be removed .*Operation not permitted .*\.distcp", line
    )
    left = {path.name for path in (tmp_path / "step_1.partial").iterdir()}
    assert {name for name in left if not name.endswith(".distcp")} == {"manifest.json"}
    Checkpoints(tmp_path, Retention(1), run_id="mine").save(4, policy, {})
    assert names_in(tmp_path) == ["step_4"]


def test_of_a_checkpoint_that_is_a_link_the_link_is_removed(model_dir: Path, tmp_path: Path) -> None:
    directory, elsewhere, said = tmp_path / "run", tmp_path / "other-disk", list[str]()
    policy = make_policy(model_dir)
    checkpoints = Checkpoints(directory, Retention(1), run_id="mine", note=said.append)
    checkpoints.save(2, policy, {})
    (directory / "step_2").rename(elsewhere)
    (directory / "step_2").symlink_to(elsewhere)
    checkpoints.save(2, policy, {})
    assert not (directory / "step_2").is_symlink()
    (directory / "step_1").symlink_to(elsewhere)
    (directory / "step_3").symlink_to(tmp_path / "nowhere")
    checkpoints.save(3, policy, {})
    assert names_in(directory) == ["step_1", "step_3"], "it is none of step 1"
    assert read_manifest(elsewhere) is not None
    assert f"step_2.replaced was a link to {elsewhere}, which stays" in said[0]


def test_what_is_not_known_to_be_the_runs_is_left(model_dir: Path, tmp_path: Path) -> None:
    """But in the way of a new one, where it is renamed."""
    policy, said = make_policy(model_dir), list[str]()
    for name in ("step_99.partial", "step_best.partial", "step_2.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").touch()
    (tmp_path / "step_3.partial").mkdir()
    write_owner(tmp_path / "step_3.partial")
    (tmp_path / "step_3.partial" / "common.pt").touch()
    checkpoints = Checkpoints(tmp_path, Retention(1), run_id="mine", note=said.append)
    checkpoints.save(2, policy, {})
    checkpoints.save(4, policy, {})
    assert names_in(tmp_path) == ["step_2.partial.damaged-1", "step_4", "step_99.partial", "step_best.partial"]
    assert (tmp_path / "step_2.partial.damaged-1" / "theirs").exists()
    assert [line.partition(" is ")[0] for line in said] == [
        f"warning: {tmp_path}/step_99.partial",
        f"warning: {tmp_path}/step_2.partial was not known to be this run's, and",
    ]


def test_a_checkpoint_that_is_not_finished_says_whose_it_is_and_nobody_is_warned_of_that(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(**_: Any) -> None:
        manifest = read_manifest(tmp_path / "step_1.partial")
        seen.append(manifest and (manifest.run_id, manifest.step, manifest.files))
        raise OSError(errno.ENOSPC, "")

    seen: list[Any] = []
    monkeypatch.setattr(checkpoint_writing, "_write_bucket", killed)
    with pytest.raises(CheckpointWriteError):
        Checkpoints(tmp_path, run_id="mine").save(1, make_policy(model_dir), {})
    assert seen[0] == ("mine", 1, {})
    assert names_in(tmp_path) == []
    assert "Overwriting" not in caplog.text


METRIC = "val/mean_reward"


def test_the_best_are_kept_and_a_later_process_knows_them(model_dir: Path, tmp_path: Path) -> None:
    """Their metrics stand in their manifests, so that a resumed run needs no other record."""
    policy, best_one = make_policy(model_dir), Retention(1, METRIC)
    checkpoints = Checkpoints(tmp_path, best_one, run_id="mine")
    for number, reward in ((1, 0.2), (2, 0.9)):
        checkpoints.save(number, policy, {}, {METRIC: reward})
    assert names_in(tmp_path) == ["step_2"]
    later = Checkpoints(tmp_path, best_one, run_id="mine")
    found = later.newest_whole()
    assert (found.step, found.metrics) == (2, {METRIC: 0.9})
    later.save(3, policy, {}, {METRIC: 0.1})
    later.save(4, policy, {}, {METRIC: 0.3})
    assert names_in(tmp_path) == ["step_2", "step_4"]


def test_checkpoints_of_another_run_are_neither_removed_nor_replaced(model_dir: Path, tmp_path: Path) -> None:
    policy, newest = make_policy(model_dir), Retention(1)
    Checkpoints(tmp_path, newest, run_id="theirs").save(1, policy, {})
    mine = Checkpoints(tmp_path, newest, run_id="mine")
    with pytest.raises(CheckpointError, match=r"step_1 belongs to another run \(theirs; this is mine\)"):
        mine.save(1, policy, {})
    mine.save(2, policy, {})
    mine.save(3, policy, {})
    assert names_in(tmp_path) == ["step_1", "step_3"]
    assert read_manifest(tmp_path / "step_1").run_id == "theirs"  # type: ignore[union-attr]


def test_a_checkpoint_names_its_run_release_and_recipe(model_dir: Path, tmp_path: Path) -> None:
    Checkpoints(tmp_path, run_id="mine", recipe="grpo: {}\n").save(4, make_policy(model_dir), {}, {METRIC: 0.5})
    manifest = read_manifest(tmp_path / "step_4")
    assert manifest is not None
    assert (manifest.run_id, manifest.step, manifest.metrics) == ("mine", 4, {METRIC: 0.5})
    assert manifest.version == version("megatron-g2rpo")
    assert (tmp_path / "step_4" / "recipe.yaml").read_text() == "grpo: {}\n"
    assert sorted(manifest.files) == files_of(tmp_path / "step_4")
    assert list(faults(tmp_path / "step_4", manifest)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_policy_that_is_not_finite_is_not_saved(model_dir: Path, tmp_path: Path, value: float) -> None:
    policy, checkpoints = make_policy(model_dir), Checkpoints(tmp_path, Retention(1))
    checkpoints.save(1, policy, {})
    dict(policy.model.named_parameters())["language_model.decoder.layers.0.mlp.linear_fc1.weight"].data[2, 3] = value
    with pytest.raises(
        PolicyNotFinite, match=r"after step 2, .* in \S*decoder\.layers\.0\.mlp\.linear_fc1\.weight\. The"
    ):
        checkpoints.save(2, policy, {})
    assert names_in(tmp_path) == ["step_1"]


def test_moments_that_are_not_finite_are_not_saved(model_dir: Path, tmp_path: Path) -> None:
    """The weights would be NaN one step later."""
    policy = make_policy(model_dir)
    step(policy)
    first = next(iter(policy.optimizer.chained_optimizers[0].state.values()))  # type: ignore[union-attr]
    first["exp_avg_sq"].view(-1)[-1] = math.nan
    with pytest.raises(PolicyNotFinite, match=r"in optimizer\.state\.exp_avg_sq\.\S+\. The"):
        Checkpoints(tmp_path).save(1, policy, {})
    assert not tmp_path.joinpath("step_1").exists()


def test_nothing_of_a_step_draws_from_a_global_generator(model_dir: Path) -> None:
    """What is drawn is a function of the recipe's seed and the step: there is no generator that a checkpoint lacks."""
    policy = make_policy(model_dir)
    before = torch.get_rng_state()
    step(policy)
    assert torch.equal(torch.get_rng_state(), before)
