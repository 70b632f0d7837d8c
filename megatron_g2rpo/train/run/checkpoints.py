# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: megatron-core's distributed format, readable at another layout, whole or not there at all."""

from __future__ import annotations

import queue
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_g2rpo.policy import checkpoint_reading
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.weights import ProcessorSettings, copy_model_files, partial_path
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES

_NAME = re.compile(r"step_(\d+)")

# Where a save leaves its results for the process that saves. megatron-core's own is a manager process, meant for saves
# that go on in the background: it takes seconds to start, and survives a rank that is killed, its terminal held open.
filesystem_async._results_queue = queue.Queue()


def write_checkpoint(
    directory: Path, policy: MegatronPolicy, state: dict[str, Any], settings: ProcessorSettings | None = None
) -> None:
    """Write a state in megatron-core's distributed format, with what its model directory holds beside weights.

    A collective of all ranks. The directory appears whole: it is written beside its place and renamed.

    Args:
        directory: the directory to write; replaced if it exists.
        policy: whose state it is.
        state: a sharded state dict, and plain values that are equal on every rank.
        settings: what the model directory's files must say of the run's processor; None to leave them as they are.
    """
    partial = partial_path(directory)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with policy.device.megatron():
        dist_checkpointing.save(sharded_state_dict=state, checkpoint_dir=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / MODEL_FILES).mkdir()
        copy_model_files(policy.settings.model_name, partial / MODEL_FILES, settings)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    dist.barrier()


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint is written to ``step_N.partial`` and renamed when every rank has finished: a job killed while it saves
    leaves the previous one untouched.

    Args:
        directory: the directory that holds the checkpoints.
        keep_latest_k: how many checkpoints to keep; None for all.
        settings: see ``write_checkpoint``.
    """

    def __init__(
        self, directory: str | Path, keep_latest_k: int | None, settings: ProcessorSettings | None = None
    ) -> None:
        self._settings = settings
        self._directory = Path(directory)
        self._keep = keep_latest_k

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self._steps(), default=None)

    def save(self, step: int, policy: MegatronPolicy, state: Mapping[str, Any]) -> None:
        """Write weights, optimizer, schedule and ``state``. A collective.

        Args:
            step: number of steps that were completed.
            policy: the policy whose state is saved.
            state: plain values that are equal on every rank, such as the position in the data.
        """
        if dist.get_rank() == 0:
            for left in self._directory.glob("step_*.partial"):  # by a job that was killed while it saved
                shutil.rmtree(left)
        everything = {**policy.sharded_state_dict(), "loop": {"step": step, **state}}
        write_checkpoint(self._directory / f"step_{step}", policy, everything, self._settings)
        if dist.get_rank() == 0:
            self._prune()
        dist.barrier()

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

    def _steps(self) -> list[int]:
        if not self._directory.exists():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return [int(match[1]) for match in matches if match]

    def _prune(self) -> None:
        if self._keep is None:
            return
        for step in sorted(self._steps())[: -self._keep]:
            shutil.rmtree(self._directory / f"step_{step}")
