# SPDX-License-Identifier: Apache-2.0
"""One checkpoint from its first byte to its name: written beside its place, renamed when all of it is on the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoint_removal import aside, remove_unfinished, removed
from megatron_g2rpo.train.run.checkpoint_writing import CheckpointWriteError, Writing
from megatron_g2rpo.train.run.owners import REPLACED
from megatron_g2rpo.weights import ProcessorSettings, copy_model_files, partial_path
from megatron_g2rpo.weights.manifest import (
    RECIPE_FILE,
    FileRecord,
    Manifest,
    files_of,
    records,
    sync,
    sync_directory,
    write_manifest,
)
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES


class Publication:
    """A checkpoint whose files are being written since this was made, and that has no name yet.

    A collective of all ranks, and so are ``is_done`` and ``publish``. What is written is the state at this moment.

    Args:
        directory: the directory to write; replaced if it exists.
        policy: whose state it is.
        state: a sharded state dict, and plain values that are equal on every rank.
        settings: what the model directory's files must say of the run's processor; None to leave them as they are.
        run_id: the run that writes it; empty for a checkpoint that belongs to none.
        step: number of steps that were completed.
        metrics: see ``Manifest``.
        recipe: text of the run's recipe, to be kept in it; None for none.

    Attributes:
        seconds: time that it took to write and publish, without what it waited between the two; 0 before.

    Raises:
        CheckpointWriteError: it could not be begun; nothing is left of it.
    """

    def __init__(
        self,
        directory: Path,
        policy: MegatronPolicy,
        state: dict[str, Any],
        settings: ProcessorSettings | None = None,
        *,
        run_id: str = "",
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        recipe: str | None = None,
    ) -> None:
        self.step, self.seconds = step, 0.0
        self._directory, self._partial = directory, partial_path(directory)
        self._policy, self._settings, self._recipe = policy, settings, recipe
        self._run_id, self._metrics = run_id, dict(metrics or {})
        from_first(self._make_partial)
        with policy.device.megatron():
            self._writing = Writing(state, self._partial, self._write_beside)

    def is_done(self) -> bool:
        """Whether the files are on the disk, or could not be written, on every rank."""
        return self._writing.is_done()

    def publish(self) -> str:
        """Wait for the files, and give the checkpoint its name.

        Returns:
            What the user must know of one that it has replaced, else nothing.

        Raises:
            CheckpointWriteError: a rank could not write its files; what was there before is as it was.
        """
        with self._policy.device.megatron():
            mine = self._writing.finish()
        written = time.monotonic()
        everyone = gather(lambda: (mine, self._writing.seconds))
        found = {path: record for records_of_rank, _ in everyone for path, record in records_of_rank.items()}
        slowest = max(seconds for _, seconds in everyone)
        note = from_first(lambda: self._publish(found, lambda: slowest + time.monotonic() - written))
        self.seconds = slowest + time.monotonic() - written
        return note

    def _make_partial(self) -> None:
        try:
            remove_unfinished(self._partial)
            self._partial.mkdir(parents=True)
            write_manifest(self._partial, self._manifest({}, None))  # whose it is, should the job be killed
        except CheckpointWriteError:
            raise
        except OSError as error:
            raise CheckpointWriteError.of(error, self._partial) from error

    def _write_beside(self) -> list[str]:
        """Write what the first rank writes beside the tensors, and return its paths."""
        models = self._partial / MODEL_FILES
        models.mkdir()
        copy_model_files(self._policy.settings.model_name, models, self._settings)
        if self._recipe is not None:
            (self._partial / RECIPE_FILE).write_text(self._recipe)
        written = [path for path in files_of(self._partial) if path.startswith(f"{MODEL_FILES}/")]
        return [*written, *([RECIPE_FILE] if self._recipe is not None else [])]

    def _publish(self, found: Mapping[str, FileRecord], seconds: Callable[[], float]) -> str:
        """Give a checkpoint that is written its name. At every moment the old or the new one can be found.

        Args:
            found: path -> what the file is, of the files that ranks wrote.
            seconds: returns the time that it has taken until now.
        """
        try:
            others = records(self._partial, [path for path in files_of(self._partial) if path not in found])
            sync_directory(self._partial)
            write_manifest(self._partial, self._manifest({**found, **others}, seconds()))
            sync(self._partial)
            old = self._directory.with_name(self._directory.name + REPLACED)
            if os.path.lexists(old):  # of a save long before, if it could neither be used nor removed
                old.rename(aside(old))
            if os.path.lexists(self._directory):
                self._directory.rename(old)
            self._partial.rename(self._directory)
            sync(self._directory.parent)
        except OSError as error:
            raise CheckpointWriteError.of(error, self._partial) from error
        return removed(old) if os.path.lexists(old) else ""

    def _manifest(self, files: Mapping[str, FileRecord], seconds: float | None) -> Manifest:
        return Manifest(
            run_id=self._run_id,
            step=self.step,
            version=version("megatron-g2rpo"),
            metrics=self._metrics,
            files=files,
            seconds=seconds,
        )
