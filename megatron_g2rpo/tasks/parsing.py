# SPDX-License-Identifier: Apache-2.0
"""Parsers of the numbers, boxes and choices that answers consist of.

A parser returns None for a text that it cannot read. Its caller decides what that means: in a model's answer it is a
wrong answer, in a reference it is an error of the dataset.
"""

from __future__ import annotations

import math
import re

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN_NUMBER = re.compile(_NUMBER)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_FRACTION = re.compile(r"([-+]?\d{1,15})\s*/\s*(\d{1,15})")  # exact in float64
_BOX = re.compile(
    r'(?:\{\s*"boxes"\s*:\s*)?\[\s*' + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*\]\s*(?:\})?", re.DOTALL
)
_CHOICE = re.compile(r"\(?([A-Za-z])(?:[.):].*)?", re.DOTALL)

Box = tuple[float, float, float, float]


def parse_number(text: str) -> float | None:
    """Parse a number: ``-3``, ``0.5``, ``1,234``, ``3/4``; leading ``$`` and final ``%`` or ``.`` are ignored."""
    text = text.strip().removeprefix("$").removesuffix(".").removesuffix("%").strip()
    if match := _FRACTION.fullmatch(text):
        numerator, denominator = int(match.group(1)), int(match.group(2))
        return numerator / denominator if denominator else None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if not _PLAIN_NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def parse_box(text: str) -> Box | None:
    """Parse a box, ``[x1, y1, x2, y2]`` or ``{"boxes": [x1, y1, x2, y2]}`` with x1 < x2 and y1 < y2."""
    match = _BOX.fullmatch(text.strip())
    if match is None:
        return None
    x1, y1, x2, y2 = (float(value) for value in match.groups())
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x1 >= x2 or y1 >= y2:
        return None
    return x1, y1, x2, y2


def parse_choice(text: str) -> str | None:
    """Parse the letter of a choice, and return it in upper case: ``C``, ``c.``, ``(C)``, ``C. clothing``."""
    match = _CHOICE.fullmatch(text.strip())
    return match.group(1).upper() if match else None
