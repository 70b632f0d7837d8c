# SPDX-License-Identifier: Apache-2.0
"""Claims: no damage to a checkpoint goes unnoticed, and a run goes on from the newest one without any."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import MANIFEST, FileRecord
from tests.unit.train.run.checkpoint_cases import make_model, make_policy, names_in, step

BIG = "__0_0.distcp"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> MegatronPolicy:
    policy = make_policy(make_model(tmp_path_factory.mktemp("model")))
    step(policy)
    return policy


@pytest.fixture(scope="module")
def two(policy: MegatronPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints of steps 4 and 6."""
    directory = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(directory, run_id="mine", recipe="sft: {}\n")
    checkpoints.save(4, policy, {"stream": 4})
    checkpoints.save(6, policy, {"stream": 6})
    return directory


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path) -> None:
    """A file becomes a directory."""
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, BIG),
    "emptied": (empty, BIG),
    "one-bit": (flip, BIG),
    "removed-tensors": (Path.unlink, BIG),
    "removed-list": (Path.unlink, ".metadata"),
    "removed-format": (Path.unlink, "metadata.json"),
    "removed-common": (Path.unlink, "common.pt"),
    "removed-tokenizer": (Path.unlink, "huggingface/config.json"),
    "one-bit-common": (flip, "common.pt"),
    "one-bit-list": (flip, ".metadata"),
    "one-bit-recipe": (flip, "recipe.yaml"),
    "emptied-manifest": (empty, MANIFEST),
    "truncated-manifest": (lambda file: file.write_text(file.read_text()[:99]), MANIFEST),
    "directory": (swap, BIG),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_taken_and_the_file_is_named(
    two: Path, tmp_path: Path, damage: str
) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    how, name = DAMAGES[damage]
    how(directory / "step_6" / name)
    found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 4
    [note] = found.notes
    assert note.startswith("checkpoint step_6 is damaged: ")
    assert str(directory / "step_6" / name) in note
    assert note.endswith("; it is now step_6.damaged-1, and the run goes on from step 4")
    assert names_in(directory) == ["step_4", "step_6.damaged-1"], "it is left to whoever looks into it"


def test_an_error_of_reading_that_passes_leaves_no_checkpoint_beyond_the_steps_on_record(
    policy: MegatronPolicy, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics of steps 5 and 6 are dropped by the process that cannot read; the next one must not go on from 6."""
    directory = shutil.copytree(two, tmp_path / "run")

    def of(path: Path) -> FileRecord:
        if path.parent.name == "step_6":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    read = FileRecord.of
    with monkeypatch.context() as patched:
        patched.setattr(FileRecord, "of", of)
        found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 4
    assert re.search(r"cannot be read: Input/output error .*; it is now step_6\.damaged-1, and", found.notes[0])
    later = Checkpoints(directory, run_id="mine")
    assert later.newest_whole() == replace(found, notes=[])
    later.save(6, policy, {})
    assert names_in(directory) == ["step_4", "step_6", "step_6.damaged-1"]


def test_what_has_a_checkpoints_name_and_is_none_is_skipped(two: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_7").write_text("a file")
    (directory / "step_8").mkdir()
    (directory / "step_9.partial").mkdir()  # of a job that was killed while it saved
    found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 6
    assert [note.split(": ")[0] for note in found.notes] == [
        "checkpoint step_8 is damaged",
        "checkpoint step_7 is damaged",
    ]
    assert "step_8 is no Megatron checkpoint" in found.notes[0]
    assert "step_7 is no directory" in found.notes[1]
    assert names_in(directory) == ["step_4", "step_6", "step_7.damaged-1", "step_8.damaged-1", "step_9.partial"]


def test_undamaged_checkpoints_give_no_note(two: Path) -> None:
    """Negative of the tests above."""
    found = Checkpoints(two, run_id="mine").newest_whole()
    assert (found.step, list(found.notes)) == (6, [])
    assert names_in(two) == ["step_4", "step_6"]
    assert Checkpoints(two / "none").newest_whole().step is None


def test_where_none_is_whole_each_is_named_and_nothing_starts_anew(two: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    cut(directory / "step_6" / BIG)
    flip(directory / "step_4" / BIG)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint is whole:\n.*--fresh") as raised:
        Checkpoints(directory, run_id="mine").newest_whole()
    lines = str(raised.value).splitlines()
    assert re.search(r"step_6 is damaged: \S*step_6/__0_0.distcp has \d+ bytes, \d+ were written", lines[1])
    assert re.search(r"step_4 is damaged: \S*step_4/__0_0.distcp holds other bytes than were written", lines[2])
    assert names_in(directory) == ["step_4", "step_6"], "nothing is moved where nothing goes on"


def as_of_an_earlier_release(checkpoint: Path) -> None:
    """Up to 0.4 there was neither a manifest nor a recipe."""
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "recipe.yaml").unlink()


@pytest.mark.parametrize("name", [BIG, ".metadata", "metadata.json", "common.pt"])
def test_a_checkpoint_without_manifest_is_read_and_its_gaps_are_seen(two: Path, tmp_path: Path, name: str) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    for checkpoint in ("step_4", "step_6"):
        as_of_an_earlier_release(directory / checkpoint)
    assert Checkpoints(directory).newest_whole().step == 6
    (directory / "step_6" / name).unlink()
    found = Checkpoints(directory).newest_whole()
    assert found.step == 4
    assert str(directory / "step_6" / name) in found.notes[0] or "step_6 is no Megatron checkpoint" in found.notes[0]


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(("name", "how"), [(BIG, cut), ("common.pt", halve), ("common.pt", empty)])
def test_a_checkpoint_without_manifest_that_is_cut_is_seen(
    two: Path, tmp_path: Path, name: str, how: Callable[[Path], None]
) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    as_of_an_earlier_release(directory / "step_6")
    how(directory / "step_6" / name)
    found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 4
    assert str(directory / "step_6" / name) in found.notes[0]


def test_a_checkpoint_that_has_lost_its_manifest_is_damaged(two: Path, tmp_path: Path) -> None:
    """Its recipe tells it from one that had none; without the manifest no byte of it is known to be right."""
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_6" / MANIFEST).unlink()
    found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 4
    assert f"{directory}/step_6/manifest.json is missing" in found.notes[0]


def test_an_archive_that_is_cut_after_it_was_looked_at_is_named(
    policy: MegatronPolicy, two: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    halve(directory / "step_6" / "common.pt")
    with pytest.raises(CheckpointError, match=rf"^{directory}/step_6: a file of it is damaged \(.*PytorchStreamReader"):
        Checkpoints(directory, run_id="mine").load(6, policy)


def test_a_checkpoint_that_has_another_ones_name_is_damaged(policy: MegatronPolicy, two: Path, tmp_path: Path) -> None:
    """Else a run would go on from it, and remove what it saves next as the older one."""
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_6").rename(directory / "step_60")
    checkpoints = Checkpoints(directory, Retention(1), run_id="mine")
    found = checkpoints.newest_whole()
    assert found.step == 4
    assert f"{directory}/step_60/manifest.json is of step 6: " in found.notes[0]
    assert "give it the name step_6 again" in found.notes[0]
    checkpoints.save(5, policy, {})
    assert names_in(directory) == ["step_5", "step_60.damaged-1"]


def test_checkpoints_of_another_run_are_not_gone_on_from_nor_moved(two: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_7").mkdir()
    with pytest.raises(CheckpointError, match=r"step_[46] belongs to another run \(mine; this is none\)"):
        Checkpoints(directory).newest_whole()
    assert names_in(directory) == ["step_4", "step_6", "step_7"]


def test_one_that_was_about_to_be_replaced_has_its_name_again(two: Path, tmp_path: Path) -> None:
    """A job that was killed between the two renames; and one that was killed after them."""
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_6").rename(directory / "step_6.replaced")
    shutil.copytree(directory / "step_4", directory / "step_4.replaced")
    assert Checkpoints(directory, run_id="mine").newest_whole().step == 6
    assert names_in(directory) == ["step_4", "step_6"]


def test_one_that_was_about_to_be_replaced_by_what_is_none_has_its_name_again(two: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(two, tmp_path / "run")
    (directory / "step_6").rename(directory / "step_6.replaced")
    for name in ("step_6", "step_best.replaced"):
        (directory / name).mkdir()
        (directory / name / "junk").touch()
    shutil.copytree(directory / "step_4", directory / "step_5.replaced")  # damaged: it says that it is of step 4
    found = Checkpoints(directory, run_id="mine").newest_whole()
    assert found.step == 6
    assert "it is now step_6.damaged-1, and step_6.replaced, which is whole, has its name again" in found.notes[0]
    assert {"step_4", "step_6", "step_6.damaged-1", "step_best.replaced"} <= set(names_in(directory))


def test_a_damaged_checkpoint_counts_for_nothing_and_is_kept(policy: MegatronPolicy, two: Path, tmp_path: Path) -> None:
    """Of the two that are to stay neither is the damaged one, though only a look at its bytes tells."""
    directory = shutil.copytree(two, tmp_path / "run")
    flip(directory / "step_6" / BIG)
    checkpoints = Checkpoints(directory, Retention(2), run_id="mine")
    checkpoints.save(8, policy, {})
    assert names_in(directory) == ["step_4", "step_6", "step_8"]
    checkpoints.save(10, policy, {})
    assert names_in(directory) == ["step_10", "step_6", "step_8"]


def test_a_damaged_checkpoint_is_renamed_when_its_step_is_saved_again(
    policy: MegatronPolicy, two: Path, tmp_path: Path
) -> None:
    """One that looked whole when the run went on, and does not say what it is since."""
    directory = shutil.copytree(two, tmp_path / "run")
    checkpoints = Checkpoints(directory, run_id="mine")
    assert checkpoints.newest_whole().step == 6
    empty(directory / "step_6" / MANIFEST)
    checkpoints.save(6, policy, {})
    assert checkpoints.has(6)
    assert names_in(directory) == ["step_4", "step_6", "step_6.damaged-1"]
    assert list(Checkpoints(directory, run_id="mine").newest_whole().notes) == []
