# SPDX-License-Identifier: Apache-2.0
"""Claims: an export replaces the same run's earlier one and nothing else; at every moment one of the two is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_g2rpo import weights
from megatron_g2rpo.weights import NotOursError, Owner
from megatron_g2rpo.weights.ownership import MARKER

SPECS = {"w": torch.empty(3, device="meta")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def export(source: Path, target: Path, value: float, run_id: str = "mine") -> None:
    tensors = iter([("w", torch.full((3,), value))])
    weights.export_hf(tensors, SPECS, target, source=source, write=True, run_id=run_id)


def value_in(directory: Path) -> float:
    return weights.SafetensorsDirectory(directory)["w"][0].item()


def beside(source: Path) -> set[str]:
    return {path.name for path in source.parent.iterdir()} - {"source"}


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_an_export_replaces_that_of_the_same_run_and_leaves_neighbours_alone(source: Path) -> None:
    target = source.with_name("hf")
    neighbours = [source.with_name(name) for name in ("hf.old", "hf.replaced-00000000", "hf.bak")]
    for neighbour in neighbours:
        neighbour.mkdir()
        (neighbour / "f").write_text("mine")
    for value in (1.0, 2.0):
        export(source, target, value)
        assert value_in(target) == value
        assert beside(source) == {"hf", *(path.name for path in neighbours)}
    assert all((neighbour / "f").read_text() == "mine" for neighbour in neighbours)
    assert json.loads((target / MARKER).read_text())["run_id"] == "mine"


def _replace_by_file(target: Path) -> None:
    shutil.rmtree(target)
    target.write_text("a file")


def _replace_by_link(target: Path) -> None:
    shutil.rmtree(target)
    target.symlink_to("nowhere")


def _edit_in_place(target: Path) -> None:
    (target / "config.json").write_text("[]")


def _other_weights(target: Path) -> None:
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"w"', b'"v"'))


def _link_in_place(target: Path) -> None:
    """As of a user who keeps the edited file elsewhere."""
    (target / "config.json").rename(target.with_name("config.json"))
    (target / "config.json").symlink_to(target.with_name("config.json"))


def _of_another_run(target: Path) -> None:
    marker = json.loads((target / MARKER).read_text())
    (target / MARKER).write_text(json.dumps({**marker, "run_id": "another"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_of_another_run, "another run or command wrote it"),
        (lambda target: (target / MARKER).unlink(), f"it has no {MARKER}"),
        (lambda target: (target / MARKER).write_text("{"), f"it has no {MARKER}"),
        (lambda target: (target / "notes.md").write_text("n"), r"did not write \(notes\.md\)"),
        (lambda target: (target / "config.json").write_text('{"edited": 1}'), r"was changed .* \(config\.json\)"),
        (_edit_in_place, r"was changed .* \(config\.json\)"),
        (_other_weights, r"was changed .* \(model\.safetensors\)"),
        (lambda target: (target / "mine").mkdir(), r"did not write \(mine\)"),
        (lambda target: (target / "mine").symlink_to(target.parent), r"did not write \(mine\)"),
        (_link_in_place, r"was changed .* \(config\.json\)"),
        (_replace_by_file, "it is no directory"),
        (_replace_by_link, "it is a link to nowhere"),
    ],
    ids=[
        *("another run's", "no marker", "broken marker", "a file more", "an edit", "an edit of the same size"),
        *("other weights of the same size", "an empty folder", "a link to a folder", "a link to the same", "a file"),
        "a dangling link",
    ],
)
def test_what_is_not_this_run_s_export_is_refused_before_the_work_and_left_as_it_is(
    source: Path, change: Callable[[Path], object], says: str
) -> None:
    target = source.with_name("hf")
    export(source, target, 1.0)
    change(target)
    before = everything(source.parent)

    def unread():
        raise AssertionError("no weight is asked for")
        yield

    for error in (
        lambda: Owner("mine").check(target),
        lambda: weights.export_hf(unread(), SPECS, target, source=source, write=True, run_id="mine"),
    ):
        with pytest.raises(
            NotOursError, match=f"{target} exists already and is not replaced: .*{says}.*; move it else"
        ):
            error()
    assert everything(source.parent) == before
    assert os.path.lexists(target)
    assert beside(source) - {"config.json"} == {"hf"}


def test_a_command_that_is_no_run_s_replaces_nothing(source: Path) -> None:
    target = source.with_name("hf")
    export(source, target, 1.0, run_id="")
    with pytest.raises(NotOursError, match="another run or command wrote it"):
        export(source, target, 2.0, run_id="")
    assert value_in(target) == 1.0


def test_where_an_export_is_written_first_only_an_interrupted_one_is_removed(source: Path) -> None:
    target, partial = source.with_name("hf"), source.with_name("hf.partial")
    partial.mkdir()
    (partial / "f").write_text("mine")
    with pytest.raises(NotOursError, match=f"{partial} is in the way"):
        export(source, target, 1.0)
    assert (partial / "f").read_text() == "mine"
    shutil.rmtree(partial)
    (Owner("killed").begin(target) / "model.safetensors").write_text("half")
    export(source, target, 1.0)
    assert beside(source) == {"hf"}


@pytest.mark.parametrize("renames", [0, 1])
def test_a_job_that_is_killed_while_it_publishes_leaves_a_whole_export(
    source: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed before the first rename and before the second; the next export goes through and cleans up."""
    target = source.with_name("hf")
    export(source, target, 1.0)
    done, rename = [], Path.rename

    def killed(self: Path, to: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(to)
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            export(source, target, 2.0)
    assert value_in(done[0] if renames else target) == 1.0, "the old one"
    assert value_in(source.with_name("hf.partial")) == 2.0, "and the new one"
    export(source, target, 3.0)
    assert value_in(target) == 3.0
    assert beside(source) == {"hf"}


@pytest.mark.parametrize("writes", [0, 1])
def test_a_disk_that_is_full_when_the_marker_is_written_leaves_no_directory_of_nobody(
    source: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """At its beginning and at its end: the next export goes through, and removes what is left."""
    target, write, done = source.with_name("hf"), Path.write_text, []

    def full(self: Path, text: str) -> int:
        if MARKER not in self.name:
            return write(self, text)
        done.append(self)
        if len(done) <= writes:
            return write(self, text)
        write(self, text[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=rf"No space left on device: '{target}.partial/{MARKER}'"):
            export(source, target, 1.0)
    export(source, target, 2.0)
    assert value_in(target) == 2.0
    assert beside(source) == {"hf"}


def test_all_is_on_the_disk_before_the_old_one_gives_way(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, synced, at_rename = source.with_name("hf"), [], []
    export(source, target, 1.0)
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (at_rename.append(set(synced)), rename(self, to))[1])
    export(source, target, 2.0)
    partial = source.with_name("hf.partial")
    files = {str(partial / path.name) for path in target.iterdir()}
    assert len(files) == 3
    assert at_rename[0] >= {*files, str(partial)}
    assert synced[-1] == str(source.parent), "and the new name afterwards"


def test_the_marker_is_no_part_of_the_model(source: Path) -> None:
    first, second = source.with_name("first"), source.with_name("second")
    export(source, first, 1.0, run_id="a")
    weights.copy_model_files(first, source)
    assert not (source / MARKER).exists()
    export(first, second, 1.0, run_id="b")
    assert json.loads((second / MARKER).read_text())["run_id"] == "b"
