# SPDX-License-Identifier: Apache-2.0
"""What lies in a directory of checkpoints: which are there, whose they are, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.train.run.checkpoint_removal import aside, cannot, is_left_by, remove_unfinished, removed
from megatron_g2rpo.train.run.files import PARTIAL
from megatron_g2rpo.train.run.owners import REPLACED, step_of
from megatron_g2rpo.weights import CheckpointError, partial_path
from megatron_g2rpo.weights.manifest import MANIFEST, Manifest, read_manifest
from megatron_g2rpo.weights.soundness import faults_of_share


class Shelf:
    """The checkpoints in a directory, seen by one run.

    Methods are for the first rank, but for collectives of all ranks, which say so, and for ``path`` and what a process
    knows of a step.

    Args:
        directory: the directory.
        run_id: the run; empty for none.
        note: shows the user a line.
    """

    def __init__(self, directory: Path, run_id: str, note: Callable[[str], None]) -> None:
        self.directory, self._run_id, self._note = directory, run_id, note
        self._told: set[str] = set()
        self._stuck: set[Path] = set()  # what could not be removed
        # Step -> what is wrong with its files, of those that were read, or written, by this process.
        self._faults: dict[int, Sequence[str]] = {}

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.directory / f"step_{step}"

    def steps(self) -> list[int]:
        """Return the steps of all that has a checkpoint's name; a file that has is a damaged one."""
        if not self.directory.exists():
            return []
        return [step for name in os.listdir(self.directory) if (step := step_of(name)) is not None]

    # -- whose --------------------------------------------------------------------------------------------------------

    def manifest(self, step: int) -> Manifest | None:
        """Return the manifest of a checkpoint; None where there is none.

        Raises:
            CheckpointError: see ``read_manifest``.
        """
        return read_manifest(self.path(step))

    def refuse_others(self, steps: Iterable[int]) -> None:
        """Check that no checkpoint names another run.

        Raises:
            CheckpointError: one does; names it and both runs.
        """
        for step in steps:
            try:
                manifest = self.manifest(step)
            except CheckpointError:
                continue
            if manifest is not None and manifest.run_id != self._run_id:
                theirs, ours = manifest.run_id or "none", self._run_id or "none"
                raise CheckpointError(
                    f"{self.path(step)} belongs to another run ({theirs}; this is {ours}) and is neither continued "
                    "nor replaced: set checkpointing.checkpoint_dir to another directory"
                )

    def ours(self) -> dict[int, Mapping[str, float]]:
        """Return metrics by step of the checkpoints that this run wrote.

        Those of releases up to 0.4 say nothing, and count as its own: without a metric.
        """
        found: dict[int, Mapping[str, float]] = {}
        for step in self.steps():
            try:
                manifest = self.manifest(step)
            except CheckpointError:
                continue
            if manifest is None or manifest.run_id == self._run_id:
                found[step] = manifest.metrics if manifest is not None else {}
        return found

    # -- whole --------------------------------------------------------------------------------------------------------

    def is_known_whole(self, step: int) -> bool:
        """Return whether this process has written the checkpoint of a step, or found it whole."""
        return step in self._faults and not self._faults[step]

    def is_known_damaged(self, step: int) -> bool:
        """Return whether this process has found the checkpoint of a step damaged."""
        return bool(self._faults.get(step))

    def written(self, step: int) -> None:
        """Remember that this process has written the checkpoint of a step."""
        self._faults[step] = ()

    def forget(self, step: int) -> None:
        """Forget what was known of a step's checkpoint, in whose place there will be another, or none."""
        self._faults.pop(step, None)

    def faults_of(self, step: int) -> Sequence[str]:
        """Return what of a checkpoint is not as it was written. A collective; read once a process."""
        if step not in self._faults:
            self._faults[step] = self._read(step, self.path(step))
        return self._faults[step]

    def _read(self, step: int, directory: Path) -> Sequence[str]:
        return [sentence for rank in gather(lambda: _faults_of_share(step, directory)) for sentence in rank]

    def recover(self) -> list[str]:
        """Give a checkpoint that was about to be replaced when its job ended its name again. A collective.

        Where one has the name that replaced it, that stays if it is whole, and so does what is neither.

        Returns:
            A line for the user about each that was damaged.
        """
        notes: list[str] = []
        for step in from_first(self._replaced):
            place, old = self.path(step), self._old(step)
            if from_first(lambda at=place: os.path.lexists(at)):
                wrong = self.faults_of(step)
                if not wrong:
                    from_first(lambda at=old: self.remove(at))
                    continue
                if self._read(step, old):
                    continue
                name = from_first(lambda at=step: self.move_aside(at))
                notes.append(
                    f"checkpoint step_{step} is damaged: {wrong[0]}; it is now {name}, and {old.name}, which is whole, "
                    "has its name again"
                )
                self.forget(step)
            from_first(lambda at=old, to=place: at.rename(to))
        return notes

    def _old(self, step: int) -> Path:
        return self.directory / f"step_{step}{REPLACED}"

    def _replaced(self) -> list[int]:
        """The steps of this run's checkpoints that were about to be replaced."""
        if not self.directory.exists():
            return []
        names = [name.removesuffix(REPLACED) for name in os.listdir(self.directory) if name.endswith(REPLACED)]
        return [
            step for name in sorted(names) if (step := step_of(name)) is not None and self._is_ours(self._old(step))
        ]

    def _is_ours(self, old: Path) -> bool:
        try:
            manifest = read_manifest(old)
        except CheckpointError:
            return False
        return manifest is None or manifest.run_id == self._run_id  # a release up to 0.4 wrote the one that is replaced

    # -- removal ------------------------------------------------------------------------------------------------------

    def move_aside(self, step: int) -> str:
        """Rename a damaged checkpoint, and return its new name.

        Raises:
            OSError: it cannot be renamed.
        """
        place = self.path(step)
        return place.rename(aside(place)).name

    def say(self, line: str) -> None:
        """Show the user a line, once a process; none if it is empty."""
        if line and line not in self._told:
            self._told.add(line)
            self._note(line)

    def remove(self, place: Path) -> None:
        """Remove a checkpoint; where that is not possible, say so."""
        self.say(removed(place))

    def retire(self, step: int) -> None:
        """Remove the checkpoint of a step; where that is not possible, say so.

        Without its name first: a job that is killed meanwhile leaves no checkpoint that looks damaged.
        """
        place = self.path(step)
        try:
            partial = place.rename(partial_path(place))
        except OSError as error:
            self.say(cannot(place, error))
        else:
            self.remove(partial)

    def remove_unfinished(self, *, but: int | None = None) -> None:
        """Remove what this run left unfinished; where that is not possible, or it may be another's, say so.

        Args:
            but: a step that is left out.
        """
        if not self.directory.exists():
            return
        for name in sorted(os.listdir(self.directory)):
            step, left = step_of(name.removesuffix(PARTIAL)), self.directory / name
            if not name.endswith(PARTIAL) or step is None or step == but:
                continue
            if not is_left_by(self._run_id, left):
                self.say(
                    f"warning: {left} is not known to be this run's, and is left where it is; remove it if no run "
                    "needs it"
                )
            elif left in self._stuck:  # it was waited for, and said
                removed(left)
            else:
                self.say(removed(left, remove_unfinished))
                self._stuck.update([left] if left.exists() else [])

    def clear(self, step: int) -> None:
        """Make way for the files of a checkpoint: what is there and not known to be this run's is renamed.

        Raises:
            OSError: it cannot be renamed.
        """
        partial = partial_path(self.path(step))
        if os.path.lexists(partial) and not is_left_by(self._run_id, partial):
            self.say(
                f"warning: {partial} was not known to be this run's, and is now {partial.rename(aside(partial)).name}"
            )


def _faults_of_share(step: int, directory: Path) -> list[str]:
    """What of this rank's share of a checkpoint's files is not as it was written."""
    if not directory.is_dir():
        return [f"{directory} is no directory"]
    try:
        manifest = read_manifest(directory)
        if manifest is not None and manifest.step != step:
            said = (
                f"{directory / MANIFEST} is of step {manifest.step}: the directory was renamed or copied; give it the "
                f"name step_{manifest.step} again"
            )
            return [said] if dist.get_rank() == 0 else []
        return faults_of_share(directory)
    except (CheckpointError, OSError) as error:
        return [str(error)]
