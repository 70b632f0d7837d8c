# SPDX-License-Identifier: Apache-2.0
"""Claims: a checkpoint that is written while the run goes on holds the step it was asked for, and appears whole."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_g2rpo.train.run import checkpoint_writing
from megatron_g2rpo.train.run.checkpoint_writing import CheckpointWriteError
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.run.retention import Retention
from tests.unit.train.run.checkpoint_cases import make_model, make_policy, names_in, step, weights_of


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


class Disk:
    """A disk that writes a checkpoint's tensors only when it is told to, or that refuses them."""

    def __init__(self) -> None:
        self.go, self.error = threading.Event(), None

    def write(self, *arguments: Any, **keywords: Any) -> None:
        assert self.go.wait(timeout=60)
        if self.error is not None:
            raise self.error
        _WRITE(*arguments, **keywords)

    error: OSError | None


_WRITE = checkpoint_writing._write_bucket


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(checkpoint_writing, "_write_bucket", disk.write)
    yield disk
    disk.go.set()  # no thread of a failed test waits on


def test_what_is_written_is_the_state_of_the_step_and_not_of_a_later_one(
    model_dir: Path, tmp_path: Path, disk: Disk
) -> None:
    straight = make_policy(model_dir)
    step(straight)
    then = weights_of(straight)
    checkpoints = Checkpoints(tmp_path, is_async=True)
    checkpoints.save(1, straight, {"stream": {"position": 6}})
    begun = time.monotonic()
    expected = [step(straight) for _ in range(2)]
    later = weights_of(straight)
    checkpoints.poll()
    assert names_in(tmp_path) == ["step_1.partial"], "no step may have waited for the disk"
    assert checkpoints.longest_s == 0.0
    waited = time.monotonic() - begun
    disk.go.set()
    checkpoints.finish()
    assert checkpoints.longest_s >= waited, "a deadline must leave time for the disk, not for the copy alone"

    restored = make_policy(model_dir)
    assert Checkpoints(tmp_path).load(1, restored) == {"step": 1, "stream": {"position": 6}}
    found = weights_of(restored)
    assert all(torch.equal(found[name], then[name]) for name in then)
    assert any(not torch.equal(later[name], then[name]) for name in then), "else this proves nothing"
    # The moments too: the steps after it are the same.
    assert [step(restored) for _ in range(2)] == expected


def test_a_kill_in_between_leaves_the_old_one(model_dir: Path, tmp_path: Path, disk: Disk) -> None:
    policy, directory = make_policy(model_dir), tmp_path / "run"
    checkpoints = Checkpoints(directory, Retention(1), is_async=True)
    disk.go.set()
    checkpoints.save(1, policy, {})
    checkpoints.finish()
    disk.go.clear()
    checkpoints.save(2, policy, {})
    left = shutil.copytree(directory, tmp_path / "killed")  # what a kill at this moment would leave
    assert names_in(left) == ["step_1", "step_2.partial"]
    resumed = Checkpoints(left, Retention(1))
    disk.go.set()
    assert (resumed.newest_whole().step, list(resumed.newest_whole().notes)) == (1, [])
    resumed.save(2, policy, {})
    assert names_in(left) == ["step_2"]
    checkpoints.finish()


def test_it_is_published_at_the_first_boundary_after_it_is_written(model_dir: Path, tmp_path: Path, disk: Disk) -> None:
    policy, checkpoints = make_policy(model_dir), Checkpoints(tmp_path, Retention(1), is_async=True)
    checkpoints.poll()  # there is none
    checkpoints.save(1, policy, {})
    checkpoints.poll()
    assert not checkpoints.has(1)
    disk.go.set()
    checkpoints._pending._writing._written.result(timeout=60)  # type: ignore[union-attr]
    assert names_in(tmp_path) == ["step_1.partial"], "its name is for all ranks to give together"
    checkpoints.poll()
    assert checkpoints.has(1)
    assert names_in(tmp_path) == ["step_1"]
    checkpoints.save(2, policy, {})
    checkpoints.save(3, policy, {})  # which waits for the one before
    assert "step_2" in names_in(tmp_path)
    checkpoints.finish()
    checkpoints.finish()
    assert names_in(tmp_path) == ["step_3"]


def test_an_error_of_the_disk_is_raised_at_the_next_boundary(model_dir: Path, tmp_path: Path, disk: Disk) -> None:
    policy, checkpoints = make_policy(model_dir), Checkpoints(tmp_path, Retention(1), is_async=True)
    disk.go.set()
    checkpoints.save(1, policy, {})
    checkpoints.finish()
    disk.error = OSError(errno.ENOSPC, "")
    checkpoints.save(2, policy, {})
    written = checkpoints._pending._writing._written  # type: ignore[union-attr]
    assert isinstance(written.exception(timeout=60), OSError)
    with pytest.raises(CheckpointWriteError) as raised:
        checkpoints.poll()
    assert str(raised.value).startswith(f"rank 0 could not write {tmp_path}/step_2.partial: No space left on device (")
    assert names_in(tmp_path) == ["step_1"]
    disk.error = None
    checkpoints.save(2, policy, {})  # nothing of the first try is in the way
    checkpoints.finish()
    assert list(Checkpoints(tmp_path).newest_whole().notes) == []
    assert names_in(tmp_path) == ["step_2"]


def test_an_error_before_the_first_tensor_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says of a full disk what its own writer of files saw."""
    policy, checkpoints = make_policy(model_dir), Checkpoints(tmp_path)
    checkpoints.save(1, policy, {})

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with monkeypatch.context() as patched:
        patched.setattr("megatron.core.dist_checkpointing.strategies.common.torch.save", full)
        with pytest.raises(
            CheckpointWriteError, match=r"rank 0 could not write .*step_2\.partial: .* MiB are free there"
        ):
            checkpoints.save(2, policy, {})
    assert names_in(tmp_path) == ["step_1"]
    checkpoints.save(2, policy, {})
    assert names_in(tmp_path) == ["step_1", "step_2"]
