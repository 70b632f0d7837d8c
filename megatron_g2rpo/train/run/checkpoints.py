# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: megatron-core's distributed format, readable at another layout, whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.policy import checkpoint_reading
from megatron_g2rpo.policy.finite import non_finite
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoint_publishing import Publication
from megatron_g2rpo.train.run.checkpoint_shelf import Shelf
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.weights import CheckpointError, ProcessorSettings

SHOWN_TENSORS = 5


class PolicyNotFinite(FloatingPointError):
    """A policy that holds NaN or an infinity is not saved; earlier checkpoints are as they were."""


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from.

    Attributes:
        step: number of steps that were completed; None where there is no checkpoint.
        notes: a line for the user about each newer checkpoint that is damaged.
        metrics, seconds: see ``Manifest``.
    """

    step: int | None
    notes: Sequence[str] = ()
    metrics: Mapping[str, float] | None = None
    seconds: float | None = None


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint is written to ``step_N.partial`` and renamed when every rank has finished and all of it is on the disk:
    a job killed while it saves leaves the previous one untouched. Older ones are removed after that alone, and only if
    this run wrote them and those that stay were found whole.

    Args:
        directory: the directory that holds the checkpoints.
        retention: which are kept; None for all.
        settings: see ``write_checkpoint``.
        run_id: the run that they belong to; those of another are never removed.
        recipe: text of the run's recipe, which is kept in each of them; None for none.
        is_async: whether ``save`` returns while the files are being written. Then ``poll`` gives a checkpoint its name
            as soon as they are, and ``finish`` waits for that.
        note: shows the user a line, of one that could not be removed; called on the first rank.
        saved: is told of each step whose checkpoint has its name; called on the first rank, and before any is removed.
    """

    def __init__(
        self,
        directory: str | Path,
        retention: Retention | None = None,
        settings: ProcessorSettings | None = None,
        *,
        run_id: str = "",
        recipe: str | None = None,
        is_async: bool = False,
        note: Callable[[str], None] = print,
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._retention = retention or Retention()
        self._settings, self._recipe, self._run_id = settings, recipe, run_id
        self._is_async, self._saved = is_async, saved
        self._pending: Publication | None = None
        self._longest_s = 0.0
        self._shelf = Shelf(Path(directory), run_id, note)

    @property
    def longest_s(self) -> float:
        """Seconds from the beginning of a checkpoint to its name, the most that one of this process took; 0: none."""
        return self._longest_s

    # -- reading ------------------------------------------------------------------------------------------------------

    def has(self, step: int) -> bool:
        """Whether this process has written the checkpoint of a step, or found it whole."""
        return self._shelf.is_known_whole(step)

    def newest_whole(self) -> Found:
        """Find the newest checkpoint of which every file is what was written. A collective of all ranks.

        The ranks share the files between them, and read each byte once: SHA-256 takes about a second per 1.2 GB on a
        core with SHA instructions, so that 8 ranks check the 160 GB of an 8B model with its optimizer in 17 s, if the
        file system gives 10 GB/s. What was read is in the page cache when it is loaded.

        Damaged ones that are newer are moved aside: an error of reading may pass, and a later process would go on from
        one, past steps that this run has dropped from its records.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged; each is named with why. Or one belongs
                to another run.
            OSError: a damaged one cannot be moved.
        """
        shelf = self._shelf
        from_first(lambda: shelf.refuse_others(shelf.steps()))
        recovered = shelf.recover()
        steps = from_first(lambda: sorted(shelf.steps(), reverse=True))
        damaged: dict[int, str] = {}
        for step in steps:
            wrong = shelf.faults_of(step)
            if not wrong:
                manifest = from_first(lambda at=step: shelf.manifest(at))
                moved = from_first(lambda: [shelf.move_aside(other) for other in damaged])
                for other in damaged:
                    shelf.forget(other)
                notes = recovered + [
                    f"{why}; it is now {name}, and the run goes on from step {step}"
                    for why, name in zip(damaged.values(), moved, strict=True)
                ]
                if manifest is None:
                    return Found(step, notes)
                return Found(step, notes, manifest.metrics, manifest.seconds)
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            damaged[step] = f"checkpoint step_{step} is damaged: {wrong[0]}{more}"
        if damaged:
            raise CheckpointError(
                f"{shelf.directory}: no checkpoint is whole:\n"
                + "\n".join(damaged.values())
                + "\nrestore one of them, or pass "
                "--fresh to move the run aside and start anew"
            )
        return Found(None)

    def load(self, step: int, policy: MegatronPolicy) -> dict[str, Any]:
        """Restore a checkpoint into the policy, which may have another layout. A collective.

        Returns:
            ``step`` and the plain values given to ``save``.
        """
        with policy.device.megatron():
            loaded: Any = checkpoint_reading.load(
                {**policy.sharded_state_dict(is_loading=True), "loop": {}}, self._shelf.path(step)
            )
            loop = loaded.pop("loop")
            policy.load_state_dict(loaded)
        return loop

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, policy: MegatronPolicy, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write weights, optimizer, schedule and ``state``. A collective.

        One that is still being written is waited for. If the checkpoints are asynchronous, this one is only begun:
        what is written is the state at this moment, and a fault of the disk is raised by ``poll`` or ``finish``.

        Args:
            step: number of steps that were completed.
            policy: the policy whose state is saved.
            state: plain values that are equal on every rank, such as the position in the data.
            metrics: see ``Manifest``.

        Raises:
            CheckpointWriteError: it could not be written; nothing is left of it, and earlier ones are as they were.
            PolicyNotFinite: the policy holds NaN or an infinity.
            CheckpointError: another run has a checkpoint of that step here.
        """
        self.finish()
        tensors = policy.sharded_state_dict()
        _check_finite(tensors, step)
        damaged = self._shelf.is_known_damaged(step)
        from_first(lambda: self._make_way(step, damaged=damaged))
        self._shelf.forget(step)
        with self._cleaning():
            self._pending = Publication(
                self._shelf.path(step),
                policy,
                {**tensors, "loop": {"step": step, **state}},
                self._settings,
                run_id=self._run_id,
                step=step,
                metrics=metrics,
                recipe=self._recipe,
            )
        if not self._is_async:
            self.finish()

    def poll(self) -> None:
        """Give the checkpoint that is being written its name if its files are on the disk. A collective.

        Raises:
            CheckpointWriteError: see ``save``.
        """
        if self._pending is not None and self._pending.is_done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name. A collective.

        Raises:
            CheckpointWriteError: see ``save``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._cleaning():
            replaced = pending.publish()
        from_first(lambda: self._say_saved(pending.step, replaced))
        self._longest_s = max(self._longest_s, pending.seconds)
        self._shelf.written(pending.step)
        self._prune()

    def _say_saved(self, step: int, replaced: str) -> None:
        self._saved(step)
        self._shelf.say(replaced)

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Leave nothing of a checkpoint that could not be written: a disk that is full is full of it."""
        try:
            yield
        except OSError:
            if dist.get_rank() == 0:  # which may be the only one to know
                self._shelf.remove_unfinished()
            raise

    def _make_way(self, step: int, *, damaged: bool) -> None:
        """Remove what a killed job left unfinished, and rename what has the name of a new checkpoint and is none."""
        self._shelf.remove_unfinished(but=step)
        self._shelf.clear(step)
        if not os.path.lexists(self._shelf.path(step)):
            return
        self._shelf.refuse_others([step])
        try:
            self._shelf.manifest(step)
        except CheckpointError:
            damaged = True
        if damaged:
            self._shelf.move_aside(step)

    def _prune(self) -> None:
        """Remove what ``Retention`` does not keep of this run's checkpoints. A collective.

        One that cannot be removed is said, and stays. A damaged one counts for nothing, and is left to whoever looks
        into it. Those that an earlier process wrote are read once, when there is one to remove.
        """
        keep = self._retention.keep_top_k
        ours = from_first(self._shelf.ours)
        if keep is None or len(ours) <= keep:
            return
        whole = {step: metrics for step, metrics in ours.items() if not self._shelf.faults_of(step)}
        kept = self._retention.kept(whole)

        def remove() -> None:
            for step in sorted(whole.keys() - kept):
                self._shelf.retire(step)

        from_first(remove)


def write_checkpoint(
    directory: Path, policy: MegatronPolicy, state: dict[str, Any], settings: ProcessorSettings | None = None
) -> None:
    """Write a state in megatron-core's distributed format, with what its model directory holds beside weights.

    A collective of all ranks. The directory appears whole: it is written beside its place, with a manifest of all its
    files, and renamed when all of it is on the disk.

    Args:
        directory: the directory to write; replaced if it exists.
        policy: whose state it is.
        state: a sharded state dict, and plain values that are equal on every rank.
        settings: what the model directory's files must say of the run's processor; None to leave them as they are.

    Raises:
        CheckpointWriteError: a rank could not write its files; what was there before is as it was.
    """
    Publication(directory, policy, state, settings).publish()


def _check_finite(state: Mapping[str, Any], step: int) -> None:
    """Refuse a state that nothing could go on from. A collective.

    Raises:
        PolicyNotFinite: names the tensors.
    """
    learnt = {part: state[part] for part in ("model", "optimizer") if part in state}
    names = list(dict.fromkeys(name for rank in gather(lambda: non_finite(learnt)) for name in rank))
    if names:
        more = f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else ""
        raise PolicyNotFinite(
            f"the policy is not finite after step {step}, and is not saved: NaN or infinity in "
            f"{', '.join(names[:SHOWN_TENSORS])}{more}. The checkpoints before it are as they were: start another run "
            "from the newest (policy.pretrained_checkpoint) with a lower policy.megatron_cfg.optimizer.lr, or look at "
            "the batch of this step"
        )
