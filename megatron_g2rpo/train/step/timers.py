# SPDX-License-Identifier: Apache-2.0
"""Seconds that each phase of a step takes, and its name in a profiler's trace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from megatron_g2rpo import progress
from megatron_g2rpo.policy.device import Device


class Timers:
    """Stopwatch of one step, by phase; the peak of the memory is counted from its making.

    Args:
        device: this rank's device; a phase ends when it has finished what was launched on it.

    Attributes:
        seconds: phase -> seconds so far.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        device.reset_peak_memory()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase, and say that it begins (``progress``); phases of the same name add up."""
        progress.enter(phase)
        start = time.perf_counter()
        with record_function(phase):
            yield
            self._device.synchronize()
        progress.advance()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Return ``time/<phase>`` and ``time/step``, their sum, in seconds."""
        return {
            **{f"time/{phase}": value for phase, value in self.seconds.items()},
            "time/step": sum(self.seconds.values()),
        }
