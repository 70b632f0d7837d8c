# SPDX-License-Identifier: Apache-2.0
"""Answer formats: functions that say how right an answer is, found by the name that samples and recipes use.

A function gets the text of a model's answer and the sample, and returns a number in [0, 1]. It gets ``""`` for a
response without an answer, which is worth 0 whatever it returns. A model's answer that cannot be read is worth 0. A
reference (``sample.answer``) that cannot be read raises ``ValueError``: the dataset is wrong, and every reward for that
sample would be.

Add one, in a file that the recipe's ``imports`` names:

    @answer_format("my_format")
    def my_format(answer: str, sample: Sample) -> float: ...
"""

from __future__ import annotations

import math
import re
from typing import TypeVar

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.parsing import parse_box, parse_choice, parse_number
from megatron_g2rpo.types import Sample

_T = TypeVar("_T")

_OPPOSITES = (("left", "right"), ("above", "below"))

register = registry.answer_formats.register


def _reference(parsed: _T | None, kind: str, sample: Sample) -> _T:
    if parsed is None:
        raise ValueError(f"the reference answer {sample.answer!r} is not {kind}")
    return parsed


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


@register("exact")
def exact(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same text, apart from case, blanks and a final full stop; else 0."""
    wanted = _reference(_normalise(sample.answer) or None, "a text", sample)
    return float(_normalise(answer) == wanted)


@register("numeric")
def numeric(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same number, to a relative 1e-6 (rounding in print); else 0."""
    wanted = _reference(parse_number(sample.answer), "a number", sample)
    got = parse_number(answer)
    return float(got is not None and math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-9))


@register("relative")
def relative(answer: str, sample: Sample) -> float:
    """Return ``max(0, 1 - |answer - reference| / |reference|)``; for a reference of 0, 1 if the answer is 0, else 0."""
    wanted = _reference(parse_number(sample.answer), "a number", sample)
    got = parse_number(answer)
    if got is None:
        return 0.0
    if wanted == 0.0:
        return float(got == 0.0)
    return max(0.0, 1.0 - abs(got - wanted) / abs(wanted))


@register("box_iou")
def box_iou(answer: str, sample: Sample) -> float:
    """Return the intersection over union of two boxes ``[x1, y1, x2, y2]`` in the same units, far edges exclusive."""
    ax1, ay1, ax2, ay2 = _reference(parse_box(sample.answer), "a box [x1, y1, x2, y2] with x1 < x2, y1 < y2", sample)
    got = parse_box(answer)
    if got is None:
        return 0.0
    bx1, by1, bx2, by2 = got
    shared = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)


@register("edit_distance")
def edit_distance(answer: str, sample: Sample) -> float:
    """Return 1 minus the Levenshtein distance divided by the length of the longer text, in characters."""
    answer, wanted = answer.strip(), _reference(sample.answer.strip() or None, "a text", sample)
    return 1.0 - levenshtein(answer, wanted) / max(len(answer), len(wanted))


@register("axes")
def axes(answer: str, sample: Sample) -> float:
    """Return the share of the reference's axes (left/right, above/below) on which the answer names its direction.

    For a reference with two axes that is 0, 1/2 or 1. An answer that names both directions of an axis names neither.
    """
    wanted = _directions(sample.answer)
    if not wanted:
        raise ValueError(f"the reference answer {sample.answer!r} names no direction (left, right, above, below)")
    got = _directions(answer)
    return sum(got.get(axis) == direction for axis, direction in wanted.items()) / len(wanted)


@register("multiple_choice")
def multiple_choice(answer: str, sample: Sample) -> float:
    """Return 1 if answer and reference are the same letter, with or without the option's text; else 0."""
    wanted = _reference(parse_choice(sample.answer), "the letter of a choice", sample)
    return float(parse_choice(answer) == wanted)


def _directions(text: str) -> dict[int, str]:
    """Return axis -> direction for each axis of which the text names exactly one direction."""
    words = set(re.findall("[a-z]+", text.casefold()))
    named = {axis: words & set(pair) for axis, pair in enumerate(_OPPOSITES)}
    return {axis: directions.pop() for axis, directions in named.items() if len(directions) == 1}


def levenshtein(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and substitutions of characters that turn ``a`` into ``b``.

    The bit-parallel algorithm of Myers (J. ACM 46, 1999) as given by Hyyro (2003): one column of the table is a pair of
    integers with a bit per character of ``a``, so that a page of text costs milliseconds.
    """
    if not a:
        return len(b)
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    where: dict[str, int] = {}
    for i, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << i
    rises, falls, distance = full, 0, len(a)  # vertical differences +1, -1; the last row's value
    for character in b:
        equal = where.get(character, 0)
        vertical = equal | falls
        diagonal = (((equal & rises) + rises) ^ rises) | equal
        horizontal_rises = falls | ~(diagonal | rises)
        horizontal_falls = rises & diagonal
        distance += bool(horizontal_rises & last) - bool(horizontal_falls & last)
        horizontal_rises = (horizontal_rises << 1) | 1
        horizontal_falls <<= 1
        rises = (horizontal_falls | ~(vertical | horizontal_rises)) & full
        falls = horizontal_rises & vertical & full
    return distance
