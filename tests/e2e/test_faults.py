# SPDX-License-Identifier: Apache-2.0
"""Claim: after a fault of disk, data or start the run directory is whole, and the run goes on as if nothing had been.

Each fault is a real one: a disk that is full, a directory that may not be written, a run that is alive, data that has
changed. None needs root. docs/faults.md says the same for users.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_g2rpo.train.run.lock import Lock
from tests.common.unprivileged import unprivileged
from tests.e2e.runs import checkpoints
from tests.e2e.toy import ROOT, Toy, error_of, metrics, numbers, only_error, succeed

PROGRAM = Path(sys.executable).with_name("megatron-g2rpo")
# A file system of its own: one that a user may mount in a namespace of his own, where that is allowed.
NAMESPACE = ("unshare", "--map-root-user", "--mount")
# Mount, fill, run; then bring back what is there.
ON_A_DISK = 'mount -t tmpfs -o "size=$1" disk "$2" && cp -a "$3/." "$2"; "${@:5}"; rc=$?; cp -a "$2/." "$4"; exit $rc'


def begin(toy: Toy, root: Path, run: Path, **sections: object) -> Path:
    """Two steps of the run whose four steps are ``straight``; its recipe."""
    recipe = toy.recipe(root / "recipe.yaml", logger={"log_dir": str(run)}, **sections)
    succeed("train", recipe, "grpo.max_num_steps=2")
    assert checkpoints(run) == ["step_2"]
    return recipe


def assert_is(run: Path, straight: Path) -> None:
    """Assert that a run left what the uninterrupted one did, bit for bit, no step twice."""
    expected, lines = metrics(straight), metrics(run)
    assert list(lines) == [0, 1, 2, 3, 4]
    assert {step: numbers(line) for step, line in lines.items() if step != 2} == {
        step: numbers(line) for step, line in expected.items() if step != 2
    }, "step 2 was validated: it was the last then"
    assert checkpoints(run) == ["step_4"]
    assert (run / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


def size_of(directory: Path) -> int:
    """Bytes of the files of a directory, each rounded up to pages as in memory."""
    files = (path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return sum(-(-size // 4096) * 4096 for size in files)


def on_a_disk(size: int, run: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``megatron-g2rpo ARGUMENTS`` while ``run`` lies on a disk of that size; what is there then is left in it."""
    disk, after = run.with_name("disk"), run.with_name("after")
    for each in (disk, after):
        each.mkdir()
    shell = ["bash", "-c", ON_A_DISK, "bash", str(size), str(disk), str(run), str(after)]
    done = subprocess.run(
        [*NAMESPACE, *shell, str(PROGRAM), *map(str, arguments), f"logger.log_dir={disk}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    shutil.rmtree(run)
    after.rename(run)
    disk.rmdir()
    return done


def with_small_files(size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``megatron-g2rpo ARGUMENTS`` in a process that may write no larger files."""
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture
def can_mount() -> None:
    """Skip where a user may not mount anything, as in most containers."""
    command = [*NAMESPACE, "sh", "-c", "mount -t tmpfs disk /mnt"]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting in a namespace of one's own is not allowed here")


@pytest.mark.full
def test_a_file_that_cannot_be_written_whole_leaves_the_checkpoint_before(
    toy: Toy, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = begin(toy, tmp_path, run)
    largest = max(path.stat().st_size for path in (run / "checkpoints").rglob("*.distcp"))
    done = with_small_files(largest // 2, "train", recipe)
    assert done.returncode == 1
    message = only_error(done.stderr)
    assert f"could not write {run}/checkpoints/step_4.partial: File too large" in message
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_2"]
    succeed("train", recipe)
    assert_is(run, straight)


@pytest.mark.full
@pytest.mark.usefixtures("can_mount")
def test_a_full_disk_leaves_the_checkpoint_before_and_a_start_on_it_leaves_everything(
    toy: Toy, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = begin(toy, tmp_path, run, checkpointing={"export_hf": False})
    checkpoint = size_of(run / "checkpoints" / "step_2")
    done = on_a_disk(size_of(run) + checkpoint // 2, run, "train", recipe)
    assert done.returncode == 1
    message = only_error(done.stderr)
    assert "disk/checkpoints/step_4.partial: No space left on device" in message
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_2"]
    assert list(metrics(run)) == [0, 1, 2, 3, 4], "what was logged before the fault"

    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    done = on_a_disk(size_of(run), run, "train", recipe)
    assert done.returncode == 1
    message = only_error(done.stderr)
    assert "No space left on device" in message
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"} == before

    succeed("train", recipe, "checkpointing.export_hf=true")
    assert_is(run, straight)


@pytest.mark.parametrize(
    "key", ["checkpointing.checkpoint_dir", pytest.param("logger.log_dir", marks=pytest.mark.full)]
)
def test_a_directory_that_may_not_be_written_is_named_before_the_first_step(toy: Toy, tmp_path: Path, key: str) -> None:
    """With the rights of a user, which root gives up for it."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    done = unprivileged(PROGRAM, "train", recipe, f"{key}={closed}", cwd=ROOT)
    assert done.returncode == 1
    message = only_error(done.stderr)
    assert str(closed) in message
    assert "Permission denied" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_directory_in_use_is_refused_by_name(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    with Lock(tmp_path / "run", "logger.log_dir") as lock:
        lock.say("0123abcd")
        for options in ((), ("--fresh",), ("--nproc", "2")):
            message = error_of("train", recipe, *options)
            assert f"logger.log_dir: {tmp_path}/run is in use by run 0123abcd (process {os.getpid()} on " in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.fixture
def live(toy: Toy, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher with two ranks that are in their second step, and their recipe; all end with the test."""
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    launcher = subprocess.Popen(
        [str(PROGRAM), "train", str(recipe), "--nproc", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: '"step": 1,' in read(tmp_path / "run" / "metrics.jsonl"), launcher)
        yield launcher, recipe
    finally:
        if launcher.poll() is None:
            launcher.terminate()
        launcher.wait(60)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition, launcher: subprocess.Popen[bytes] | None = None, seconds: float = 180) -> None:
    """Wait until a condition holds; a launcher that ends, or the time, fails the test."""
    end = time.monotonic() + seconds
    while not condition():
        assert launcher is None or launcher.poll() is None, "the run ended"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.full
def test_a_second_run_is_refused_until_every_writer_of_the_first_is_gone(
    live: tuple[subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    launcher, recipe = live
    run = tmp_path / "run"
    for options in ((), ("--fresh",)):
        message = error_of("train", recipe, "--nproc", "2", *options)
        assert f"process {launcher.pid} on " in message
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()

    def is_free() -> bool:
        try:
            Lock(run, "logger.log_dir").release()
        except ValueError:
            return False
        return True

    wait_for(is_free, seconds=60)
    before = read(run / "metrics.jsonl")
    time.sleep(3)
    assert read(run / "metrics.jsonl") == before, "nobody writes once the directory is free"
    succeed("train", recipe, "--nproc", "2")
    assert list(metrics(run)) == [0, 1, 2, 3, 4]


@pytest.mark.full
def test_a_shard_that_is_damaged_during_a_run_is_named_and_repaired_it_is_the_same_run(
    toy: Toy, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy.data, tmp_path / "data")
    run, mine = tmp_path / "run", Toy(tmp_path / "data", toy.model, toy.device)
    recipe = begin(mine, tmp_path, run)
    shards = {path: path.read_bytes() for path in (mine.data / "train").glob("*.tar")}
    for path, whole in shards.items():
        path.write_bytes(whole.replace(b"\x89PNG\r\n\x1a\n", bytes(8)))
        assert path.read_bytes() != whole
    message = error_of("train", recipe)
    assert re.search(
        r"shard shard-\d+\.tar, sample '[a-z]+-\d+': '\d\.png' is not what index\.json recorded; restore", message
    )
    assert checkpoints(run) == ["step_2"]
    for path, whole in shards.items():
        path.write_bytes(whole)
    succeed("train", recipe)
    assert_is(run, straight)
