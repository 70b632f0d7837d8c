# SPDX-License-Identifier: Apache-2.0
"""Answers that are JSON, as models write it: fenced, with a sentence before it, with Python's quotes, or broken."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from megatron_g2rpo.tasks.answers.reading import unwrap

_LONGEST = 100_000  # characters; boxes of a thousand frames are a third of it
_FENCE = re.compile(r"```[A-Za-z0-9]*\s([^`]*)```")


def read_json(text: str) -> Any:
    """Return the object or list that a text is, or that begins first in it; None where there is none.

    ``NaN`` and ``Infinity`` are no JSON. Texts of more than 100,000 characters are not read.
    """
    if len(text) > _LONGEST:
        return None
    text = unwrap(text)
    if fenced := _FENCE.search(text):
        text = fenced[1]
    for attempt in (text, text.replace("'", '"')):
        start = min((where for where in (attempt.find("{"), attempt.find("[")) if where >= 0), default=-1)
        if start < 0:
            return None
        try:
            value, _ = _DECODER.raw_decode(attempt, start)
        except (ValueError, RecursionError):  # recursion: a response may repeat `[` for long
            continue
        return value if isinstance(value, dict | list) else None
    return None


def numbers_of(value: Any, count: int) -> tuple[float, ...] | None:
    """Return a JSON list of ``count`` finite numbers as floats; numbers written as texts count. None for all else."""
    if not isinstance(value, list) or len(value) != count:
        return None
    numbers = [number_of(each) for each in value]
    return tuple(each for each in numbers if each is not None) if None not in numbers else None


def number_of(value: Any) -> float | None:
    """Return a JSON number, or a short text that is one, as a finite float; None for all else."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (isinstance(value, str) and len(value) > 40)
    ):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e9 else None  # false for NaN and the infinities, too


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
