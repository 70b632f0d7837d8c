# SPDX-License-Identifier: Apache-2.0
"""Frames of coordinates: what the numbers of a box or a point count.

The data says it, in two fields of a sample: ``box_frame``, in which the reference is written, and ``answer_frame``, in
which the question asks for the answer (by default the same one).

| frame | x and y count |
|---|---|
| ``original`` (default) | pixels of the image as the dataset has it |
| ``resized`` | pixels of the image as the model gets it |
| ``relative`` | thousandths of the image's width and height, 0 to 1000 |
| ``fraction`` | the image's width and height themselves, 0 to 1 |

The image is the first, or that which the field ``box_image`` numbers from 0. Its size is only needed, and looked up,
where the two frames differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_g2rpo.registry import nearest

if TYPE_CHECKING:
    from megatron_g2rpo.types import Sample

FRAMES = ("original", "resized", "relative", "fraction")


def answer_scale(sample: Sample) -> tuple[float, float]:
    """Return the factors of x and y that turn an answer's coordinates into those of the sample's reference.

    Raises:
        ValueError: an unknown frame, or a frame of which the sample's images do not say the size.
    """
    wanted = sample.extra.get("box_frame", "original")
    got = sample.extra.get("answer_frame", wanted)
    for field, frame in (("box_frame", wanted), ("answer_frame", got)):
        if frame not in FRAMES:
            raise ValueError(f"the field {field!r} says {frame!r}, an unknown frame{nearest(str(frame), FRAMES)}")
    if got == wanted:
        return 1.0, 1.0
    (width, height), (answer_width, answer_height) = _extent(wanted, sample), _extent(got, sample)
    return width / answer_width, height / answer_height


def _extent(frame: str, sample: Sample) -> tuple[float, float]:
    """Return how much the width and the height of the image count in a frame."""
    if frame == "relative":
        return 1000.0, 1000.0
    if frame == "fraction":
        return 1.0, 1.0
    index = sample.extra.get("box_image", 0)
    sizes = sample.image_sizes if frame == "original" else sample.resized_sizes
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(sizes):
        known = "images" if frame == "original" else "sizes of resized images"
        raise ValueError(
            f"the boxes are in the frame {frame!r} of image {index!r}, but the sample has {len(sizes)} {known}; "
            "the fields 'box_frame', 'answer_frame' and 'box_image' say which frame and image are meant"
        )
    width, height = sizes[index]
    return float(width), float(height)
