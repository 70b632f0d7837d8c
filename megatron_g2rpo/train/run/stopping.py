# SPDX-License-Identifier: Apache-2.0
"""When a run stops before its last step: signals and deadlines, and how the ranks agree on it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.recipe.run_sections import seconds_of
from megatron_g2rpo.train.run import signals
from megatron_g2rpo.train.run.signals import STARTED, StopRequest
from megatron_g2rpo.train.run.slurm_time import LONGER, SLURM_END_NAME, seconds_left

# Of a Slurm job's time, what the run leaves for its last files, for its processes to end and for a slow disk, seconds.
MARGIN_S = 60.0
_RECIPE_KEY = "checkpointing.checkpoint_must_save_by"
_REMEDIES = {_RECIPE_KEY: "set it to more", SLURM_END_NAME: LONGER}
# Codes for the reduction over ranks, whose largest wins: a signal, which may move the run elsewhere, over a deadline.
_RECIPE, _SLURM, _SIGNALS = 1, 2, 1000


class RunStopped(Exception):
    """The run was asked to stop, and did; the message says what is saved.

    Attributes:
        resumable: whether the same command goes on with nothing lost.
    """

    def __init__(self, message: str, *, resumable: bool) -> None:
        super().__init__(message)
        self.resumable = resumable


class SamplingStopped(Exception):
    """Rollouts under way were dropped, because a rank was asked to stop; the message says by what."""


class Stopping:
    """Whether the run is to stop, and by when it has to have saved.

    Each rank looks at its own signals and clock. ``agreed`` is what they decide on together.

    Args:
        must_save_by: ``checkpointing.checkpoint_must_save_by``; None: no such limit.
        request: what signals have asked for.
        environment: where Slurm says when its job ends.
    """

    def __init__(
        self,
        must_save_by: str | None,
        request: StopRequest | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._request = signals.current() if request is None else request
        self._deadlines: dict[int, float] = {}  # code -> the moment by which all must be saved, monotonic seconds
        if must_save_by is not None:
            self._deadlines[_RECIPE] = STARTED + seconds_of(must_save_by)
        left = seconds_left(environment)
        if left is not None:
            self._deadlines[_SLURM] = time.monotonic() + left - MARGIN_S
        self._longest_save = self._longest_step = 0.0
        self._last = time.monotonic()

    def begin(self) -> None:
        """Begin the run: from now on a signal waits for a safe point, and steps are measured."""
        self._request.begin()
        self._last = time.monotonic()

    def end(self) -> None:
        """End the run: from now on a signal asks for nothing that is not about to happen by itself."""
        self._request.done()

    def step_ended(self) -> None:
        """Note that a step ended here, with its validation and checkpoint."""
        now = time.monotonic()
        self._longest_step, self._last = max(self._longest_step, now - self._last), now

    def saved_in(self, seconds: float) -> None:
        """Note how long a checkpoint took."""
        self._longest_save = max(self._longest_save, seconds)

    def asked(self, *, steps: int = 0) -> str | None:
        """Return what asks this rank to stop; None: nothing.

        Args:
            steps: number of steps to the next safe point, for which a deadline must leave time as for a checkpoint: as
                much as the longest of this process took, with its validation and checkpoint.
        """
        code = self._code(steps)
        return _name(code) if code else None

    def agreed(self, *, steps: int = 0, only_if: bool = True) -> str | None:
        """Return what asks any rank to stop, the same on all of them; None: nothing. A collective of all ranks.

        Args:
            only_if: whether this rank has a say.
            steps: see ``asked``. 1 between two steps; 0 after the last, and where a step can be dropped.
        """
        code = torch.tensor([self._code(steps) if only_if else 0])
        all_reduce(code, op=dist.ReduceOp.MAX)
        return _name(int(code)) if code else None

    def saved(self) -> None:
        """Say that all is saved that can be. A collective of all ranks: torchrun ends them all when one has left."""
        dist.barrier()
        self._request.saved()

    def _code(self, steps: int) -> int:
        if self._request.number is not None:
            return _SLURM if self._request.is_notice else _SIGNALS + self._request.number
        ready = time.monotonic() + steps * self._longest_step + self._longest_save
        return max((code for code, deadline in self._deadlines.items() if ready >= deadline), default=0)


def remedy(reason: str) -> str | None:
    """Return what to do about a deadline that leaves no time for a step; None where the reason is a signal.

    Args:
        reason: what ``Stopping`` said that asks to stop.
    """
    return _REMEDIES.get(reason)


def _name(code: int) -> str:
    if code in (_RECIPE, _SLURM):
        return _RECIPE_KEY if code == _RECIPE else SLURM_END_NAME
    return signals.described(code - _SIGNALS)
