# SPDX-License-Identifier: Apache-2.0
"""Rewards for how a response is made, not for what it answers: its structure and its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_g2rpo.tasks.parsing import find_thinking

Step = tuple[float, str, float]

_OPERATORS = str.maketrans("×x÷−", "**/-")
_STEP = re.compile(r"(\d+(?:\.\d+)?)\s*([-+*/×x÷−])\s*(-?\d+(?:\.\d+)?)")


def trapezoid(length: float, start: float, peak_start: float, peak_end: float, end: float) -> float:
    """Length reward: 0 up to ``start``, rising to 1 at ``peak_start``, 1 to ``peak_end``, falling to 0 at ``end``.

    All in response tokens. Where two bounds coincide the plateau wins.

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
    """How much too long a response is: 0 up to ``limit - buffer`` tokens, falling to -1 at ``limit``.

    Source: the length-aware penalty of DAPO, arXiv 2503.14476, section 3.4.
    """
    return -min(max((length - (limit - buffer)) / buffer, 0.0), 1.0)


def structure_bonus(response: str, reference_steps: str) -> float:
    """How much of the reference's working the thinking states: the share of right operands and operators.

    The k-th step stated (``7 + 5``) is held against the k-th reference step, so that a list of guesses earns nothing.

    Raises:
        ValueError: the reference states no step.
    """
    wanted = _steps(reference_steps)
    if not wanted:
        raise ValueError(f"the reference steps {reference_steps!r} state no step such as '7 + 5'")
    stated = _steps(find_thinking(response) or "")
    right = sum(a == b for got, step in zip(stated, wanted, strict=False) for a, b in zip(got, step, strict=True))
    return right / (3 * len(wanted))


def _steps(text: str) -> Sequence[Step]:
    return [(float(a), op.translate(_OPERATORS), float(b)) for a, op, b in _STEP.findall(text)]
