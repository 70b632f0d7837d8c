# SPDX-License-Identifier: Apache-2.0
"""Boxes in an image: one or several, in the notations of models and datasets, compared by intersection over union.

Read are ``[x1, y1, x2, y2]``, lists of such, ``{"boxes": ...}``, ``{"bbox_2d": ...}``, ``{"bbox": ...}`` and lists of
them, fenced or not; ``(x1, y1), (x2, y2)`` with or without ``<box>`` tags; ``{"x1": ..., "y1": ..., "x2": ...}``,
``x1=..., y1=...``; and four bare numbers, with commas or blanks between them. They are also found in a sentence, or in
JSON that is broken around them: that a response is what was asked for is for the reward parts ``format`` and
``structure``. The frame of the coordinates is the data's (``frames``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.frames import answer_scale
from megatron_g2rpo.tasks.answers.reading import readable, reference_of, unwrap
from megatron_g2rpo.tasks.answers.structured import numbers_of, read_json

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

Box = tuple[float, float, float, float]

_KIND = "a box [x1, y1, x2, y2] with x1 < x2, y1 < y2, or a list of such boxes"
_LONGEST = 100_000  # characters
_MOST = 256  # boxes; the optimal matching of so many takes milliseconds
_KEYS = ("boxes", "box", "bbox_2d", "bbox", "bboxes", "bounding_box", "bounding_boxes")
_NUMBER = r"([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))"
_N = rf"\s*{_NUMBER}\s*"
_CORNERS = re.compile(rf"\({_N},{_N}\)\s*,?\s*\({_N},{_N}\)")
_LISTED = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]")
_NAMED = re.compile(r"[\s,]*".join(rf"\b{name}\s*[=:]\s*{_NUMBER}" for name in ("x1", "y1", "x2", "y2")), re.IGNORECASE)
_BARE = re.compile(rf"{_N},{_N},{_N},{_N}|" + r"\s+".join([_NUMBER] * 4))
_TAGS = re.compile(r"<\|?/?(?:box|bbox|ref|box_start|box_end|object_ref_start|object_ref_end)\|?>")


def parse_boxes(text: str) -> list[Box] | None:
    """Return the boxes of a text, in the text's order, whether or not their corners are in order; None without any."""
    if len(text) > _LONGEST:
        return None
    text = _TAGS.sub(" ", unwrap(text)).strip()
    found = boxes_of(read_json(text))
    if found is None:
        for pattern in (_CORNERS, _LISTED, _NAMED):
            found = [_box(match.groups()) for match in pattern.finditer(text)]
            if found:
                break
        else:
            bare = _BARE.fullmatch(text)
            found = [_box([each for each in bare.groups() if each is not None])] if bare else None
    return found if found and len(found) <= _MOST else None


def boxes_of(value: Any) -> list[Box] | None:
    """Return the boxes in a JSON value: one, a list, or an object that has them under one of the usual keys."""
    if isinstance(value, dict):
        if corners := numbers_of([value.get(key) for key in ("x1", "y1", "x2", "y2")], 4):
            return [_box(corners)]
        held = [value[key] for key in _KEYS if key in value]
        return boxes_of(held[0]) if held and not isinstance(held[0], dict) else None
    if not isinstance(value, list) or not value or len(value) > _MOST:
        return None
    if (one := numbers_of(value, 4)) is not None:
        return [_box(one)]
    if numbers_of(value, 2) is None and len(value) == 2 and all(numbers_of(corner, 2) for corner in value):
        return [_box([*value[0], *value[1]])]  # [[x1, y1], [x2, y2]]
    found: list[Box] = []
    for each in value:
        numbers = numbers_of(each, 4)
        several = [_box(numbers)] if numbers else boxes_of(each) if isinstance(each, dict) else None
        if several is None:
            return None
        found += several
    return found


def _box(values: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def is_proper(box: Box) -> bool:
    """Return whether a box has an area: x1 < x2 and y1 < y2."""
    return box[0] < box[2] and box[1] < box[3]


def scaled(box: Box, scale: tuple[float, float]) -> Box:
    """Return a box with x and y multiplied by the two factors."""
    if scale == (1.0, 1.0):
        return box
    return box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]


def iou(got: Box, wanted: Box) -> float:
    """Return the intersection over union of a box and a proper box, far edges exclusive; 0 for a box without area."""
    if not is_proper(got):
        return 0.0
    ax1, ay1, ax2, ay2 = wanted
    bx1, by1, bx2, by2 = got
    shared = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)


def mean_of_best_matching(got: Sequence[Any], wanted: Sequence[Any], compare: Callable[[Any, Any], float]) -> float:
    """Return the sum of ``compare`` over the best one-to-one matching, divided by the length of the longer list.

    So what is missing and what is too many costs as much as what is wrong. Two empty lists are worth 1.

    Args:
        got: what an answer has; n of them.
        wanted: what a reference has; m of them.
        compare: how alike one of each is, 0 to 1; called n x m times.
    """
    if not got or not wanted:
        return float(len(got) == len(wanted))
    if len(got) == len(wanted) == 1:
        return compare(got[0], wanted[0])
    from scipy.optimize import linear_sum_assignment

    alike = [[compare(mine, yours) for yours in wanted] for mine in got]
    rows, columns = linear_sum_assignment(alike, maximize=True)
    return math.fsum(alike[row][column] for row, column in zip(rows, columns, strict=True)) / max(len(got), len(wanted))


def compare_boxes(got: list[Box] | None, wanted: list[Box], scale: tuple[float, float]) -> float:
    """Return the mean intersection over union of the best matching; ``scale`` is that of ``frames.answer_scale``."""
    if not got:
        return 0.0
    return mean_of_best_matching([scaled(box, scale) for box in got], wanted, iou)


def reference_boxes(found: list[Box] | None, reference: str) -> list[Box]:
    """Return the boxes of a reference.

    Raises:
        ValueError: there are none, or one has no area.
    """
    return readable(found if found and all(map(is_proper, found)) else None, _KIND, reference)


@register("box_iou")
def box_iou(answer: str, sample: Sample) -> float:
    """Return the intersection over union of two boxes ``[x1, y1, x2, y2]``, far edges exclusive.

    Several boxes are matched one to one so that the sum of their intersections over unions is largest; it is divided by
    the number of boxes in the longer list. Both may be in frames of their own (``frames``).
    """
    reference, scale = reference_of(sample), answer_scale(sample)
    wanted = reference_boxes(parse_boxes(reference), reference)
    return compare_boxes(parse_boxes(answer), wanted, scale)


@register("spatial grounding")
def spatial_grounding(answer: str, sample: Sample) -> float:
    """Return what ``box_iou`` returns: the same format under the name of the paper's data.

    Source: the type `spatial grounding` of OneThinker and OpenVLThinkerV2, ``{"boxes": [x1, y1, x2, y2]}``; their boxes
    are in thousandths of the image: ``box_frame: relative``.
    """
    return box_iou(answer, sample)
