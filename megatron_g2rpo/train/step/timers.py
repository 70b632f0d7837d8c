# SPDX-License-Identifier: Apache-2.0
"""Seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_g2rpo.train.assembly import Components


class Timers:
    """Seconds of the phases of a step."""

    def __init__(self, parts: Components) -> None:
        self._device = parts.device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; phases of the same name add up."""
        start = time.perf_counter()
        yield
        self._device.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """``time/<phase>`` and ``time/step``, their sum, in seconds."""
        return {
            **{f"time/{phase}": value for phase, value in self.seconds.items()},
            "time/step": sum(self.seconds.values()),
        }
