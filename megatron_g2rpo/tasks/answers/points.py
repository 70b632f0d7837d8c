# SPDX-License-Identifier: Apache-2.0
"""Points in an image: near those of the reference, or inside of its box.

Read are ``[x, y]``, lists of such, ``{"points": ...}``, ``{"point_2d": ...}``, ``{"x": ..., "y": ...}`` and lists of
them, fenced or not; ``(x, y)``, also several; and ``<point x="..." y="...">`` or ``<points x1="..." y1="..." ...>``.
The frame of the coordinates is the data's (``frames``).
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.boxes import mean_of_best_matching, parse_boxes, reference_boxes
from megatron_g2rpo.tasks.answers.frames import answer_scale
from megatron_g2rpo.tasks.answers.reading import readable, reference_of, unwrap
from megatron_g2rpo.tasks.answers.structured import numbers_of, read_json

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

Point = tuple[float, float]

_LONGEST = 100_000  # characters
_MOST = 256
_SIGMA = 50.0
_KEYS = ("points", "point", "point_2d", "points_2d", "coordinate", "coordinates")
_N = r"\s*([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s*"
_PAIR = re.compile(rf"[(\[]{_N},{_N}[)\]]")
_TAGGED = re.compile(rf"\bx(\d{{0,3}})\s*=\s*[\"']{_N}[\"']\s*y\1\s*=\s*[\"']{_N}[\"']")
_BARE = re.compile(rf"{_N},{_N}")


def parse_points(text: str) -> list[Point] | None:
    """Return the points of a text, in its order; None without any."""
    if len(text) > _LONGEST:
        return None
    text = unwrap(text)
    found = points_of(read_json(text))
    if found is None:
        matches = list(_PAIR.finditer(text)) or list(_TAGGED.finditer(text)) or [*filter(None, [_BARE.fullmatch(text)])]
        found = [(float(x), float(y)) for *_, x, y in (match.groups() for match in matches)]
    return found if found and len(found) <= _MOST else None


def points_of(value: Any) -> list[Point] | None:
    """Return the points in a JSON value: one, a list, or an object that has them under one of the usual keys."""
    if isinstance(value, dict):
        if one := numbers_of([value.get("x"), value.get("y")], 2):
            return [(one[0], one[1])]
        held = [value[key] for key in _KEYS if key in value]
        return points_of(held[0]) if held and not isinstance(held[0], dict) else None
    if not isinstance(value, list) or len(value) > _MOST:
        return None
    if one := numbers_of(value, 2):
        return [(one[0], one[1])]
    found: list[Point] = []
    for each in value:
        numbers = numbers_of(each, 2)
        several = [(numbers[0], numbers[1])] if numbers else points_of(each) if isinstance(each, dict) else None
        if several is None:
            return None
        found += several
    return found


def compare_points(got: list[Point] | None, wanted: list[Point], scale: tuple[float, float]) -> float:
    """Return the mean nearness of the best matching, ``exp(-d^2 / (2 * 50^2))`` of each distance d.

    Distances are in the units of the reference's frame: 50 thousandths of the image in the paper's data.
    """
    if got is None:
        return 0.0
    return mean_of_best_matching([(x * scale[0], y * scale[1]) for x, y in got], wanted, _nearness)


def _nearness(got: Point, wanted: Point) -> float:
    return math.exp(-((got[0] - wanted[0]) ** 2 + (got[1] - wanted[1]) ** 2) / (2 * _SIGMA**2))


@register("points")
def points(answer: str, sample: Sample) -> float:
    """Return how near the points of an answer are to those of the reference, ``[[x, y], ...]``.

    They are matched one to one so that the sum of ``exp(-d^2 / (2 * 50^2))`` is largest, d in units of the reference's
    frame; the sum is divided by the number of points in the longer list.

    Source: the term for points of the type `segmentation` of OneThinker.
    """
    reference = reference_of(sample)
    wanted = readable(parse_points(reference), "a point [x, y] or a list of points", reference)
    return compare_points(parse_points(answer), wanted, answer_scale(sample))


@register("point_in_box")
def point_in_box(answer: str, sample: Sample) -> float:
    """Return 1 if the answer is one point inside of the reference's box, ``[x1, y1, x2, y2]``, its edges included.

    It is what benchmarks of screens ask: whether a click would hit. An answer that is a box stands for its centre.
    """
    reference, scale = reference_of(sample), answer_scale(sample)
    wanted = reference_boxes(parse_boxes(reference), reference)
    x1, y1, x2, y2 = readable(wanted[0] if len(wanted) == 1 else None, "one box [x1, y1, x2, y2]", reference)
    boxes = parse_boxes(answer)
    got = [((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes] if boxes else parse_points(answer) or []
    if len(got) != 1:
        return 0.0
    x, y = got[0][0] * scale[0], got[0][1] * scale[1]
    return float(x1 <= x <= x2 and y1 <= y <= y2)
