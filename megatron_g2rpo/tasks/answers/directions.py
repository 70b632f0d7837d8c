# SPDX-License-Identifier: Apache-2.0
"""Directions in a picture: left or right, above or below."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.answers.reading import fold, reference_of

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

register = registry.answer_formats.register

_OPPOSITES = (("left", "right"), ("above", "below"))


@register("axes")
def axes(answer: str, sample: Sample) -> float:
    """Return the share of the reference's axes (left/right, above/below) on which the answer names its direction.

    For a reference with two axes that is 0, 1/2 or 1. An answer that names both directions of an axis names neither.
    """
    wanted = _directions(reference_of(sample))
    if not wanted:
        raise ValueError(f"the reference answer {sample.answer!r} names no direction (left, right, above, below)")
    got = _directions(answer)
    return sum(got.get(axis) == direction for axis, direction in wanted.items()) / len(wanted)


def _directions(text: str) -> dict[int, str]:
    """Return axis -> direction for each axis of which the text names exactly one direction."""
    words = set(re.findall("[a-z]+", fold(text).casefold()))
    named = {axis: words & set(pair) for axis, pair in enumerate(_OPPOSITES)}
    return {axis: directions.pop() for axis, directions in named.items() if len(directions) == 1}
