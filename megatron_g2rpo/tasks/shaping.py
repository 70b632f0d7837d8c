# SPDX-License-Identifier: Apache-2.0
"""Rewards and penalties that depend on the length of a response alone."""

from __future__ import annotations


def trapezoid(length: float, start: float, peak_start: float, peak_end: float, end: float) -> float:
    """Return a length reward: 0 up to ``start``, rising to 1 at ``peak_start``, 1 to ``peak_end``, 0 from ``end`` on.

    All lengths are in response tokens. Where two bounds coincide, the value at that length is the higher one.

    Raises:
        ValueError: the bounds are not in order.
    """
    if not start <= peak_start <= peak_end <= end:
        raise ValueError(f"length bounds {start}, {peak_start}, {peak_end}, {end} are not in ascending order")
    if peak_start <= length <= peak_end:
        return 1.0
    if length <= start or length >= end:
        return 0.0
    if length < peak_start:
        return (length - start) / (peak_start - start)
    return (end - length) / (end - peak_end)


def overlong_penalty(length: float, limit: float, buffer: float) -> float:
    """Return the penalty on a long response: 0 up to ``limit - buffer`` tokens, falling to -1 at ``limit``.

    Source: the length-aware penalty of DAPO, arXiv 2503.14476, section 3.4.
    """
    return -min(max((length - (limit - buffer)) / buffer, 0.0), 1.0)
