# SPDX-License-Identifier: Apache-2.0
"""Claim: a box means the same place in whichever frame it is written, and a size that is missing is asked for."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_g2rpo import registry
from tests.unit.tasks.common import make_sample

ORIGINAL, RESIZED = (640, 480), (336, 252)
EXTENTS = {"original": ORIGINAL, "resized": RESIZED, "relative": (1000, 1000), "fraction": (1, 1)}


def score(name: str, answer: str, reference: str, **extra) -> float:
    sample = make_sample(
        answer=reference, images=[Image.new("RGB", ORIGINAL)], resized_sizes=[RESIZED], extra=extra, answer_format=name
    )
    return registry.answer_formats.get(name)(answer, sample)


def written(shares: list[float], frame: str) -> list[float]:
    """Shares of the width and of the height, in turn, in the units of a frame."""
    return [share * EXTENTS[frame][index % 2] for index, share in enumerate(shares)]


@pytest.mark.parametrize("box_frame", EXTENTS)
@pytest.mark.parametrize("answer_frame", EXTENTS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shares=st.lists(st.floats(0.01, 0.49), min_size=8, max_size=8))
def test_the_score_does_not_depend_on_the_frames(box_frame, answer_frame, shares):
    wanted, got = ([a, b, a + c, b + d] for a, b, c, d in (shares[:4], shares[4:]))
    plain = score("box_iou", json.dumps(got), json.dumps(wanted))
    converted = score(
        "box_iou",
        json.dumps(written(got, answer_frame)),
        json.dumps(written(wanted, box_frame)),
        box_frame=box_frame,
        answer_frame=answer_frame,
    )
    assert converted == pytest.approx(plain, abs=1e-9)  # products of rounded numbers


@pytest.mark.parametrize("box_frame", EXTENTS)
@pytest.mark.parametrize("answer_frame", EXTENTS)
@pytest.mark.parametrize("name", ["points", "point_in_box", "tracking", "spatial-temporal grounding", "segmentation"])
def test_every_format_with_coordinates_converts_them(name, box_frame, answer_frame):
    def text(frame):
        box, point = written([0.25, 0.25, 0.5, 0.5], frame), written([0.3, 0.3], frame)
        return json.dumps(
            {
                "points": [point],
                "point_in_box": box,
                "tracking": {"boxes": {"1": box}},
                "spatial-temporal grounding": {"time": [1, 2], "boxes": {"1": box}},
                "segmentation": {"boxes": box, "positive_points": [point], "negative_points": []},
            }[name]
        )

    frames = {"box_frame": box_frame, "answer_frame": answer_frame}
    assert score(name, text(answer_frame), text(box_frame), **frames) == pytest.approx(1.0, abs=1e-9)


def test_the_reference_s_frame_is_the_default_of_the_answer_s_and_needs_no_image():
    sample = make_sample(answer="[1, 2, 30, 40]", extra={"box_frame": "resized"})
    assert registry.answer_formats.get("box_iou")("[1, 2, 30, 40]", sample) == 1.0


def test_the_image_of_the_boxes_is_numbered():
    images = [Image.new("RGB", (10, 10)), Image.new("RGB", (2000, 500))]
    extra = {"box_frame": "relative", "answer_frame": "original", "box_image": 1}
    sample = make_sample(answer="[0, 0, 500, 500]", images=images, extra=extra)
    assert registry.answer_formats.get("box_iou")("[0, 0, 1000, 250]", sample) == 1.0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"box_frame": "relativ"}, r"'box_frame' says 'relativ', an unknown frame \(did you mean 'relative'\?\)"),
        ({"answer_frame": 5}, "'answer_frame' says 5"),
        ({"box_frame": "relative", "answer_frame": "resized"}, "the sample has 0 sizes of resized images"),
        ({"box_frame": "relative", "answer_frame": "original"}, "the sample has 0 images"),
        ({"answer_frame": "relative", "box_image": True}, "of image True"),
    ],
)
def test_a_frame_that_is_unknown_or_has_no_size_is_an_error_that_says_so(extra, said):
    with pytest.raises(ValueError, match=said):
        registry.answer_formats.get("box_iou")("[1, 2, 30, 40]", make_sample(answer="[1, 2, 30, 40]", extra=extra))
