# SPDX-License-Identifier: Apache-2.0
"""Counts the times that the host waited for the virtual device, by operator and by the line that made it wait."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def synchronisations() -> Counter[str]:
    """Return how often the host has waited in this process, by operator, for example aten::_local_scalar_dense."""
    import _virtual_cuda

    return Counter(_virtual_cuda.synchronisations())


@contextlib.contextmanager
def counted_synchronisations(within: str | None = None) -> Iterator[Counter[str]]:
    """Count the waits of the host inside the block.

    They are those that ``torch.cuda.set_sync_debug_mode`` reports (copies between host and device that are not
    ``non_blocking``, ``item()``, operators whose result has a shape that depends on data) and what waits by name:
    ``synchronize`` of a device, a stream or an event, and a barrier.

    Args:
        within: part of a path, for example "megatron_g2rpo/policy". Each wait is then counted under its operator and
            the innermost line of such a file, as "operator file.py:12"; a wait outside, under the operator alone.

    Yields:
        Number of waits by operator; it fills as the block runs.
    """
    import _virtual_cuda

    counts: Counter[str] = Counter()

    def listen(operator: str) -> None:
        counts[operator if within is None else f"{operator} {_line(within)}".strip()] += 1

    _virtual_cuda.listen(listen)
    try:
        yield counts
    finally:
        _virtual_cuda.listen(None)


def _line(within: str) -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if within in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
