# SPDX-License-Identifier: Apache-2.0
"""Prompts for a segmentation model: a box, points inside and outside of the object, and for a video a moment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.boxes import boxes_of, compare_boxes, reference_boxes
from megatron_g2rpo.tasks.answers.frames import answer_scale
from megatron_g2rpo.tasks.answers.points import compare_points, points_of
from megatron_g2rpo.tasks.answers.reading import readable, reference_of
from megatron_g2rpo.tasks.answers.structured import number_of, read_json

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_KIND = (
    'a prompt for segmentation, {"boxes": [x1, y1, x2, y2], "positive_points": [[x, y], ...], "negative_points": '
    '[[x, y], ...]}, for a video with "time": seconds'
)
_POINTS = ("positive_points", "negative_points")


@register("segmentation")
def segmentation(answer: str, sample: Sample) -> float:
    """Return how near a prompt for a segmentation model is to that of the reference.

    For an image, ``0.5 box + 0.25 positive + 0.25 negative points``; for a video, which is a reference with a ``time``
    in seconds, ``0.3 box + 0.3 exp(-|time difference| / 2) + 0.2 positive + 0.2 negative points``. The box is worth its
    intersection over union (``box_iou``), points are matched and worth their nearness (``points``), and lists that are
    empty in both are worth 1.

    Source: the two types of segmentation of OneThinker.
    """
    reference = reference_of(sample)
    wanted: Any = read_json(reference)
    if not isinstance(wanted, dict) or not {"boxes", *_POINTS} <= wanted.keys():
        wanted = None
    wanted = readable(wanted, _KIND, reference)
    boxes = reference_boxes(boxes_of(wanted["boxes"]), reference)
    points = [readable(points_of(wanted[key]), _KIND, reference) for key in _POINTS]
    moment = readable(number_of(wanted["time"]), _KIND, reference) if "time" in wanted else None
    scale, got = answer_scale(sample), read_json(answer)
    if not isinstance(got, dict):
        return 0.0
    box = compare_boxes(boxes_of(got.get("boxes")), boxes, scale)
    positive, negative = (
        compare_points(points_of(got.get(key)), each, scale) for key, each in zip(_POINTS, points, strict=True)
    )
    if moment is None:
        return 0.5 * box + 0.25 * positive + 0.25 * negative
    time = number_of(got.get("time"))
    nearness = 0.0 if time is None else math.exp(-abs(time - moment) / 2)
    return min(1.0, 0.3 * box + 0.3 * nearness + 0.2 * positive + 0.2 * negative)
