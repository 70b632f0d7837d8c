# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: megatron-core's distributed format, readable at another layout, whole or not there at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.policy import checkpoint_reading
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoint_writing import Writing
from megatron_g2rpo.weights import CheckpointError, ProcessorSettings, copy_model_files, partial_path
from megatron_g2rpo.weights.checkpoint_metadata import structural_faults
from megatron_g2rpo.weights.manifest import (
    FileRecord,
    Manifest,
    faults,
    files_of,
    read_manifest,
    records,
    sync,
    sync_directory,
    write_manifest,
)
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES

_NAME = re.compile(r"step_(\d+)")
_REPLACED = ".replaced"


def write_checkpoint(
    directory: Path,
    policy: MegatronPolicy,
    state: dict[str, Any],
    settings: ProcessorSettings | None = None,
    *,
    run_id: str = "",
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a state in megatron-core's distributed format, with what its model directory holds beside weights.

    A collective of all ranks. The directory appears whole: it is written beside its place, with a manifest of all its
    files, and renamed when all of it is on the disk.

    Args:
        directory: the directory to write; replaced if it exists.
        policy: whose state it is.
        state: a sharded state dict, and plain values that are equal on every rank.
        settings: what the model directory's files must say of the run's processor; None to leave them as they are.
        run_id: the run that writes it; empty for a checkpoint that belongs to none.
        step: number of steps that were completed.
        metrics: see ``Manifest``.

    Raises:
        CheckpointWriteError: a rank could not write its files; what was there before is as it was.
    """
    partial = partial_path(directory)
    from_first(lambda: _make_empty(partial))
    with policy.device.megatron():
        mine = Writing(state, partial).finish()
    everyone = gather(lambda: mine)
    found = {path: record for rank in everyone for path, record in rank.items()}

    def publish() -> None:
        copy_model_files(policy.settings.model_name, _made(partial / MODEL_FILES), settings)
        others = records(partial, [path for path in files_of(partial) if path not in found])
        sync_directory(partial)
        _publish(partial, directory, _manifest({**found, **others}, run_id, step, metrics))

    from_first(publish)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _manifest(files: Mapping[str, FileRecord], run_id: str, step: int, metrics: Mapping[str, float] | None) -> Manifest:
    return Manifest(
        run_id=run_id, step=step, version=version("megatron-g2rpo"), metrics=dict(metrics or {}), files=files
    )


def _publish(partial: Path, directory: Path, manifest: Manifest) -> None:
    """Give a checkpoint that is written its name. At every moment the old or the new one can be found."""
    write_manifest(partial, manifest)
    old = directory.with_name(directory.name + _REPLACED)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    if old.exists():
        shutil.rmtree(old)


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from.

    Attributes:
        step: number of steps that were completed; None where there is no checkpoint.
        notes: a line for the user about each newer checkpoint that is damaged.
    """

    step: int | None
    notes: Sequence[str] = ()


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint is written to ``step_N.partial`` and renamed when every rank has finished and all of it is on the disk:
    a job killed while it saves leaves the previous one untouched.

    Args:
        directory: the directory that holds the checkpoints.
        keep_latest_k: how many checkpoints to keep; None for all.
        settings: see ``write_checkpoint``.
        run_id: the run that they belong to; those of another are never removed.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_latest_k: int | None,
        settings: ProcessorSettings | None = None,
        *,
        run_id: str = "",
    ) -> None:
        self._settings = settings
        self._directory = Path(directory)
        self._keep = keep_latest_k
        self._run_id = run_id

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None. Whether it is undamaged is not looked at."""
        return max(self._steps(), default=None)

    def newest_whole(self) -> Found:
        """Find the newest checkpoint of which every file is what was written. A collective of all ranks.

        The ranks share the files between them.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged; each is named with why.
        """
        steps = from_first(lambda: sorted(self._recovered(), reverse=True))
        damaged: list[str] = []
        for step in steps:
            wrong = [sentence for rank in gather(lambda at=step: self._faults(at)) for sentence in rank]
            if not wrong:
                return Found(step, [f"{why}; the run goes on from step {step}" for why in damaged])
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            damaged.append(f"checkpoint step_{step} is damaged: {wrong[0]}{more}")
        if damaged:
            raise CheckpointError(
                f"{self._directory}: no checkpoint is whole:\n" + "\n".join(damaged) + "\nrestore one of them, or pass "
                "--fresh to move the run aside and start anew"
            )
        return Found(None)

    def _faults(self, step: int) -> list[str]:
        """What this rank's share of a checkpoint's files is not as it was written."""
        directory = self._directory / f"step_{step}"
        try:
            manifest = read_manifest(directory)
        except CheckpointError as error:
            return [str(error)]
        rank, size = dist.get_rank(), dist.get_world_size()
        if manifest is None:  # of a release up to 0.4
            return list(structural_faults(directory)) if rank == 0 else []
        return list(faults(directory, manifest, sorted(manifest.files)[rank::size]))

    def save(
        self, step: int, policy: MegatronPolicy, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write weights, optimizer, schedule and ``state``. A collective.

        Args:
            step: number of steps that were completed.
            policy: the policy whose state is saved.
            state: plain values that are equal on every rank, such as the position in the data.
            metrics: see ``Manifest``.

        Raises:
            CheckpointWriteError: it could not be written; nothing is left of it, and earlier ones are as they were.
        """
        from_first(self._remove_unfinished)
        everything = {**policy.sharded_state_dict(), "loop": {"step": step, **state}}
        directory = self._directory / f"step_{step}"
        try:
            write_checkpoint(
                directory, policy, everything, self._settings, run_id=self._run_id, step=step, metrics=metrics
            )
        except OSError:
            from_first(self._remove_unfinished)  # a disk that is full is full of it
            raise
        from_first(self._prune)

    def load(self, step: int, policy: MegatronPolicy) -> dict[str, Any]:
        """Restore a checkpoint into the policy, which may have another layout. A collective.

        Returns:
            ``step`` and the plain values given to ``save``.
        """
        with policy.device.megatron():
            loaded: Any = checkpoint_reading.load(
                {**policy.sharded_state_dict(is_loading=True), "loop": {}}, self._directory / f"step_{step}"
            )
            loop = loaded.pop("loop")
            policy.load_state_dict(loaded)
        return loop

    def _remove_unfinished(self) -> None:
        """Remove what a job left that was killed while it saved."""
        for left in self._directory.glob("step_*.partial"):
            shutil.rmtree(left)

    def _recovered(self) -> list[int]:
        """The steps, after a checkpoint that was about to be replaced when its job ended has its name again."""
        for old in self._directory.glob(f"step_*{_REPLACED}"):
            place = old.with_name(old.name.removesuffix(_REPLACED))
            if place.exists():
                shutil.rmtree(old)
            else:
                old.rename(place)
        return self._steps()

    def _steps(self) -> list[int]:
        if not self._directory.exists():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._directory.iterdir() if path.is_dir())
        return [int(match[1]) for match in matches if match]

    def _prune(self) -> None:
        if self._keep is None:
            return
        for step in sorted(filter(self._is_ours, self._steps()))[: -self._keep]:
            shutil.rmtree(self._directory / f"step_{step}")

    def _is_ours(self, step: int) -> bool:
        """Whether this run wrote a checkpoint; those of releases up to 0.4 say nothing, and count as its own."""
        try:
            manifest = read_manifest(self._directory / f"step_{step}")
        except CheckpointError:
            return False  # what is damaged is kept for whoever looks into it
        return manifest is None or manifest.run_id == self._run_id
