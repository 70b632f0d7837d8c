# SPDX-License-Identifier: Apache-2.0
"""Answers about videos: an interval of time, boxes by second or by frame, and both."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.boxes import Box, iou, is_proper, scaled
from megatron_g2rpo.tasks.answers.frames import answer_scale
from megatron_g2rpo.tasks.answers.reading import readable, reference_of, unwrap
from megatron_g2rpo.tasks.answers.structured import number_of, numbers_of, read_json

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

Interval = tuple[float, float]

_LONGEST = 200  # characters of an interval that is no JSON
_CLOCK = r"(?:\d{1,3}:)?\d{1,3}:\d{2}(?:\.\d{1,6})?|\d{1,9}(?:\.\d{0,9})?"
_SECONDS = r"\s*(?:s|secs?|seconds?)?\s*"
_ENDS = rf"({_CLOCK}){_SECONDS}(?:-|,|to|and|until)\s*({_CLOCK}){_SECONDS}"
_SPAN = re.compile(rf"(?:from\s+|between\s+)?[\[(]?\s*{_ENDS}[\])]?\.?", re.IGNORECASE)
_IN_SENTENCE = re.compile(rf"\b(?:from|between)\s+{_ENDS}(?![\w:])", re.IGNORECASE)
_INTERVAL = 'an interval {"time": [start, end]} in seconds with start < end'
_TRACK = 'boxes by frame, {"boxes": {"1": [x1, y1, x2, y2], ...}}, with x1 < x2, y1 < y2'


def parse_interval(text: str) -> Interval | None:
    """Return start and end in seconds: ``{"time": [1.5, 4]}``, ``[1.5, 4]``, ``1.5s to 4s``, ``00:01 - 00:04``.

    In a sentence they are read after ``from`` or ``between``, where that is said once.
    """
    found = interval_of(read_json(text))
    if found is not None:
        return found
    text = unwrap(text)
    if len(text) > _LONGEST:
        return None
    if (span := _SPAN.fullmatch(text)) is None:
        spans = list(_IN_SENTENCE.finditer(text))
        span = spans[0] if len(spans) == 1 else None
    return (_seconds(span[1]), _seconds(span[2])) if span else None


def interval_of(value: Any) -> Interval | None:
    """Return start and end of a JSON value: a list of two numbers, or an object that has one under ``time``."""
    if isinstance(value, dict):
        value = value.get("time", value.get("timestamps"))
    numbers = numbers_of(value, 2)
    return (numbers[0], numbers[1]) if numbers else None


def _seconds(clock: str) -> float:
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def interval_iou(got: Interval | None, wanted: Interval) -> float:
    """Return the intersection over union of two intervals; 0 for one that does not last."""
    if got is None or got[0] >= got[1]:
        return 0.0
    shared = max(0.0, min(got[1], wanted[1]) - max(got[0], wanted[0]))
    return shared / ((got[1] - got[0]) + (wanted[1] - wanted[0]) - shared)


def track_of(value: Any) -> dict[float, Box]:
    """Return frame or second -> box of a JSON value; what is no box, or under no number, is left out."""
    if isinstance(value, dict):
        value = value.get("boxes", value)
    if not isinstance(value, dict):
        return {}
    track: dict[float, Box] = {}
    for key, box in value.items():
        frame, corners = number_of(key), numbers_of(box, 4)
        if frame is not None and corners is not None:
            track[frame] = (corners[0], corners[1], corners[2], corners[3])
    return track


def mean_iou(got: dict[float, Box], wanted: dict[float, Box], scale: tuple[float, float]) -> float:
    """Return the mean intersection over union over the frames of the reference; a frame that is missing is worth 0."""
    shared = (iou(scaled(got[frame], scale), box) for frame, box in wanted.items() if frame in got)
    return sum(shared) / len(wanted)


def _reference_interval(reference: str) -> Interval:
    found = parse_interval(reference)
    return readable(found if found and found[0] < found[1] else None, _INTERVAL, reference)


def _reference_track(reference: str) -> dict[float, Box]:
    value = read_json(reference)
    track = track_of(value)
    boxes = value.get("boxes", value) if isinstance(value, dict) else {}
    whole = bool(track) and len(track) == len(boxes) and all(map(is_proper, track.values()))
    return readable(track if whole else None, _TRACK, reference)


@register("temporal grounding")
def temporal_grounding(answer: str, sample: Sample) -> float:
    """Return the intersection over union of two intervals of time, ``{"time": [start, end]}`` in seconds.

    Source: the type `temporal grounding` of OneThinker.
    """
    return interval_iou(parse_interval(answer), _reference_interval(reference_of(sample)))


@register("tracking")
def tracking(answer: str, sample: Sample) -> float:
    """Return the mean intersection over union over the reference's frames, ``{"boxes": {"1": [x1, y1, x2, y2], ...}}``.

    A frame that the answer lacks is worth 0; one that the reference lacks is ignored.

    Source: the type `tracking` of OneThinker.
    """
    wanted, scale = _reference_track(reference_of(sample)), answer_scale(sample)
    return mean_iou(track_of(read_json(answer)), wanted, scale)


@register("spatial-temporal grounding")
def spatial_temporal_grounding(answer: str, sample: Sample) -> float:
    """Return half the intersection over union in time, and half the mean one in space over the reference's seconds.

    A reference is ``{"time": [start, end], "boxes": {"9": [x1, y1, x2, y2], ...}}``, a box for each whole second.

    Source: the type `spatial-temporal grounding` of OneThinker. Its public code averages over the seconds that both
    have, so that one easy second would be worth as much as all; here a second that the answer lacks is worth 0.
    """
    reference = reference_of(sample)
    value = read_json(reference)
    whole = value if isinstance(value, dict) and value.keys() >= {"time", "boxes"} else None
    readable(whole, "an object with time and boxes", reference)
    interval, track = _reference_interval(reference), _reference_track(reference)
    scale, got = answer_scale(sample), read_json(answer)
    if not isinstance(got, dict):
        return 0.0
    boxes = track_of({"boxes": got.get("boxes", {})})
    return 0.5 * interval_iou(interval_of(got), interval) + 0.5 * mean_iou(boxes, track, scale)
