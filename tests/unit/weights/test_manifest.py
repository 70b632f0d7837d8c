# SPDX-License-Identifier: Apache-2.0
"""Claim: a manifest notices every change of a file that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    faults,
    files_of,
    read_manifest,
    records,
    sync_directory,
    write_manifest,
)

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step_3"
    (directory / "huggingface").mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(CONTENT)
    (directory / "huggingface" / "config.json").write_text("{}")
    files = records(directory, files_of(directory))
    sync_directory(directory)
    metrics = {"val/mean_reward": 0.25}
    write_manifest(directory, Manifest(run_id="r", step=3, version="1", metrics=metrics, files=files, seconds=1.5))
    return directory


def found(directory: Path, paths: list[str] | None = None) -> list[str]:
    manifest = read_manifest(directory)
    assert manifest is not None
    return list(faults(directory, manifest, paths))


def test_what_is_written_is_read(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest == Manifest(
        run_id="r",
        step=3,
        version="1",
        metrics={"val/mean_reward": 0.25},
        files={
            "__0_0.distcp": FileRecord(len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
            "huggingface/config.json": FileRecord(2, hashlib.sha256(b"{}").hexdigest()),
        },
        seconds=1.5,
    )
    assert found(checkpoint) == []


def _flip(path: Path) -> None:
    path.write_bytes(CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip, "__0_0.distcp holds other bytes than were written"),
        (lambda path: path.write_bytes(CONTENT[:-1]), "__0_0.distcp has 10239 bytes, 10240 were written"),
        (lambda path: path.write_bytes(b""), "__0_0.distcp has 0 bytes, 10240 were written"),
        (Path.unlink, "__0_0.distcp is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "__0_0.distcp"),
    ],
    ids=["a bit", "a byte less", "empty", "missing", "a folder"],
)
def test_every_damage_is_one_sentence_that_names_the_file(
    checkpoint: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(checkpoint / "__0_0.distcp")
    [sentence] = found(checkpoint)
    assert says in sentence
    assert found(checkpoint, ["huggingface/config.json"]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}'])
def test_a_manifest_that_is_damaged_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(checkpoint)


def test_a_manifest_that_does_not_say_how_long_it_took_is_read(checkpoint: Path) -> None:
    """One of the releases that did not say."""
    file = checkpoint / MANIFEST
    tree = json.loads(file.read_text())
    del tree["seconds"]
    file.write_text(json.dumps(tree))
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert (manifest.seconds, manifest.step) == (None, 3)


def test_a_checkpoint_of_an_earlier_release_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
