# SPDX-License-Identifier: Apache-2.0
"""Accuracy rewards, one per answer format, by name.

An accuracy reward compares the text of a model's answer with the text of the reference and returns a number in [0, 1].
A model's answer that cannot be read is worth 0. A reference that cannot be read raises ``ValueError``: the dataset is
wrong, and every reward for that sample would be.

Add one:

    @register_accuracy("my_format")
    def my_format(answer: str, reference: str) -> float: ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeVar

from megatron_g2rpo.tasks.parsing import parse_box, parse_choice, parse_number

AccuracyFunction = Callable[[str, str], float]
_Function = TypeVar("_Function", bound=AccuracyFunction)
_T = TypeVar("_T")
_REGISTRY: dict[str, AccuracyFunction] = {}

_OPPOSITES = (("left", "right"), ("above", "below"))


def register_accuracy(name: str) -> Callable[[_Function], _Function]:
    """Decorator: make an accuracy reward known under ``name``, the ``answer_format`` of samples and recipes.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: _Function) -> _Function:
        if name in _REGISTRY:
            raise ValueError(f"accuracy reward {name!r} is registered already")
        _REGISTRY[name] = function
        return function

    return register


def accuracy_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_REGISTRY))


def get_accuracy(name: str) -> AccuracyFunction:
    """The accuracy reward of an answer format.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown answer format {name!r}; known: {', '.join(accuracy_names())}")
    return _REGISTRY[name]


def _reference(parsed: _T | None, kind: str, text: str) -> _T:
    if parsed is None:
        raise ValueError(f"the reference answer {text!r} is not {kind}")
    return parsed


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


@register_accuracy("exact")
def exact(answer: str, reference: str) -> float:
    """1 if both are the same text, whatever their case, blanks and final full stop; else 0."""
    wanted = _reference(_normalise(reference) or None, "a text", reference)
    return float(_normalise(answer) == wanted)


@register_accuracy("numeric")
def numeric(answer: str, reference: str) -> float:
    """1 if both are the same number, to a relative 1e-6 (rounding of decimals in print); else 0."""
    wanted = _reference(parse_number(reference), "a number", reference)
    got = parse_number(answer)
    return float(got is not None and math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-9))


@register_accuracy("relative")
def relative(answer: str, reference: str) -> float:
    """max(0, 1 - |answer - reference| / |reference|); for a reference of 0, whether the answer is 0."""
    wanted = _reference(parse_number(reference), "a number", reference)
    got = parse_number(answer)
    if got is None:
        return 0.0
    if wanted == 0.0:
        return float(got == 0.0)
    return max(0.0, 1.0 - abs(got - wanted) / abs(wanted))


@register_accuracy("box_iou")
def box_iou(answer: str, reference: str) -> float:
    """Intersection over union of two boxes ``[x1, y1, x2, y2]`` in the same units, far edges exclusive."""
    ax1, ay1, ax2, ay2 = _reference(parse_box(reference), "a box [x1, y1, x2, y2] with x1 < x2, y1 < y2", reference)
    got = parse_box(answer)
    if got is None:
        return 0.0
    bx1, by1, bx2, by2 = got
    shared = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)


@register_accuracy("edit_distance")
def edit_distance(answer: str, reference: str) -> float:
    """1 - Levenshtein distance / length of the longer text (characters)."""
    answer, wanted = answer.strip(), _reference(reference.strip() or None, "a text", reference)
    return 1.0 - levenshtein(answer, wanted) / max(len(answer), len(wanted))


@register_accuracy("axes")
def axes(answer: str, reference: str) -> float:
    """Share of the reference's axes (left/right, above/below) that the answer names rightly: 0, 1/2 or 1 for two axes.

    An answer that names both directions of an axis names none.
    """
    wanted = _directions(reference)
    if not wanted:
        raise ValueError(f"the reference answer {reference!r} names no direction (left, right, above, below)")
    got = _directions(answer)
    return sum(got.get(axis) == direction for axis, direction in wanted.items()) / len(wanted)


@register_accuracy("multiple_choice")
def multiple_choice(answer: str, reference: str) -> float:
    """1 if both are the same letter, with or without the option's text; else 0."""
    wanted = _reference(parse_choice(reference), "the letter of a choice", reference)
    return float(parse_choice(answer) == wanted)


def _directions(text: str) -> dict[int, str]:
    """Axis -> direction, for the axes of which exactly one direction is named."""
    words = set(re.findall("[a-z]+", text.casefold()))
    named = {axis: words & set(pair) for axis, pair in enumerate(_OPPOSITES)}
    return {axis: directions.pop() for axis, directions in named.items() if len(directions) == 1}


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions (characters) that turn ``a`` into ``b``.

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
