# SPDX-License-Identifier: Apache-2.0
"""What a step costs: the processor's seconds of this process, all threads, by phase, and its peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step did, which must be the same on all sides.

    Attributes:
        rollouts: answers.
        prompt_tokens: tokens of the prompts, each counted once.
        answer_tokens: tokens of all answers.
        updates: optimizer steps.
        images: distinct images.
    """

    rollouts: int
    prompt_tokens: int
    answer_tokens: int
    updates: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step.

    Attributes:
        cpu: the processor's seconds.
        wall: seconds by the wall clock.
        phases: phase -> the processor's seconds; what is in none of them is the rest.
        peak_bytes: the process's largest resident memory so far.
        work: what was done.
        untrained: parameters that had no gradient, by name; empty for a step that did not look.
    """

    cpu: float
    wall: float
    phases: dict[str, float]
    peak_bytes: int
    work: Work
    untrained: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


class Meter:
    """Stopwatch of one step on the processor's clock."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.process_time(), time.perf_counter()

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure a phase; what is measured inside of another counts for the inner one alone."""
        start, inner = time.process_time(), sum(self.phases.values())
        yield
        spent = time.process_time() - start
        self.add(phase, spent - (sum(self.phases.values()) - inner))

    def stop(self, work: Work, untrained: list[str]) -> Step:
        """Return what was measured since this meter was made."""
        return Step(
            cpu=time.process_time() - self._start[0],
            wall=time.perf_counter() - self._start[1],
            phases=dict(self.phases),
            peak_bytes=peak_bytes(),
            work=work,
            untrained=untrained,
        )


def untrained(gradients: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of parameters whose gradient is not there or all zero, of ``(name, gradient)`` each."""
    return [name for name, gradient in gradients if gradient is None or not torch.count_nonzero(gradient)]


def peak_bytes() -> int:
    """Return this process's largest resident memory so far, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
