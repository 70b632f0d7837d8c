# SPDX-License-Identifier: Apache-2.0
"""Answer formats against independent oracles: pixel sets, exact fractions, the textbook table, all permutations."""

from fractions import Fraction
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_g2rpo import registry
from megatron_g2rpo.tasks import score_answer
from tests.common.builtin import builtin_names
from tests.unit.tasks.common import make_sample

REFERENCES = {
    "OCR": "two words",
    "axes": "left above",
    "box_iou": "[1, 2, 30, 40]",
    "edit_distance": "word",
    "exact": "blue",
    "math": r"$$\frac{\sqrt{2}}{3}$$",
    "multiple choice": "C",
    "multiple_choice": "C",
    "numeric": "12",
    "numerical": "12.34",
    "open-ended": "The dog runs.",
    "point_in_box": "[100, 200, 300, 400]",
    "points": "[[100, 200], [300, 400]]",
    "regression": "347",
    "relative": "347",
    "segmentation": '{"boxes": [1, 2, 30, 40], "positive_points": [[1, 2]], "negative_points": [], "time": 3}',
    "spatial grounding": '{"boxes": [1, 2, 30, 40]}',
    "spatial-temporal grounding": '{"time": [1, 3], "boxes": {"1": [1, 2, 30, 40], "2": [1, 2, 30, 50]}}',
    "temporal grounding": '{"time": [12.3, 25.7]}',
    "tracking": '{"boxes": {"1": [1, 2, 30, 40], "32": [1, 2, 30, 50]}}',
}
NO_NUMBER = ("a dozen", "9" * 400, "12 13", "1/0", '["5", "many"]', "[]")  # the second overflows to infinity
NO_BOX = ("[30, 2, 1, 40]", "[1, 2, 3]", "[]", "[[1, 2, 30, 40], [5, 5, 5, 5]]", "here")
BROKEN_REFERENCES = {
    "OCR": ("  ", "<answer></answer>"),
    "axes": ("here",),
    "box_iou": NO_BOX,
    "edit_distance": ("  ",),
    "exact": ("", "[]"),
    "math": ("", "$$", "."),
    "multiple choice": ("dogs", "A or B"),
    "multiple_choice": ("dogs", "A or B"),
    "numeric": NO_NUMBER,
    "numerical": NO_NUMBER,
    "open-ended": ("  ", "?!"),
    "point_in_box": NO_BOX,
    "points": ("[1, 2, 3]", "[]", "here"),
    "regression": NO_NUMBER,
    "relative": NO_NUMBER,
    "segmentation": (
        "[1, 2, 30, 40]",
        '{"boxes": [1, 2, 30, 40]}',
        '{"boxes": [30, 2, 1, 40], "positive_points": [], "negative_points": []}',
        '{"boxes": [1, 2, 30, 40], "positive_points": 5, "negative_points": []}',
        '{"boxes": [1, 2, 30, 40], "positive_points": [], "negative_points": [], "time": "late"}',
    ),
    "spatial grounding": NO_BOX,
    "spatial-temporal grounding": (
        '{"time": [1, 3]}',
        '{"boxes": {"1": [1, 2, 30, 40]}}',
        '{"time": [3, 1], "boxes": {"1": [1, 2, 30, 40]}}',
        '{"time": [1, 3], "boxes": {}}',
    ),
    "temporal grounding": ('{"time": [25.7, 12.3]}', '{"time": 5}', "soon"),
    "tracking": ('{"boxes": {}}', '{"boxes": {"1": [30, 2, 1, 40]}}', '{"boxes": {"first": [1, 2, 30, 40]}}', "[1, 2]"),
}


def accuracy(name: str, answer: str, reference: str) -> float:
    """What an answer format makes of an answer to a sample with this reference."""
    return registry.answer_formats.get(name)(answer, make_sample(answer=reference, answer_format=name))


def test_every_answer_format_has_a_case_here():
    assert builtin_names(registry.answer_formats) == set(REFERENCES) == set(BROKEN_REFERENCES)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_the_reference_itself_is_worth_one(name):
    assert accuracy(name, REFERENCES[name], REFERENCES[name]) == 1.0


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize(
    "answer",
    ["", "?", "[1, 2, 3", "[1, 2, 1, 2]", "9" * 400, "9" * 5000 + "/7", "1/0", "\x00", "[[[[", "-", "{}", "[]"],
)
def test_an_answer_that_cannot_be_read_is_worth_nothing_and_is_no_error(name, answer):
    assert accuracy(name, answer, REFERENCES[name]) == 0.0


@pytest.mark.parametrize(
    ("name", "reference"), [(name, each) for name, broken in sorted(BROKEN_REFERENCES.items()) for each in broken]
)
def test_a_reference_that_cannot_be_read_is_an_error_even_for_an_unreadable_answer(name, reference):
    for answer in ("", reference):
        with pytest.raises(ValueError, match="reference"):
            accuracy(name, answer, reference)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_reference_that_is_no_text_is_named(name):
    with pytest.raises(ValueError, match='the reference answer 5 is not a text; write it as one, "5"'):
        accuracy(name, "5", 5)


@pytest.mark.parametrize("name", sorted(REFERENCES))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(answer=st.text(max_size=30) | st.from_regex(r"\[?[-\d., ]{0,20}\]?", fullmatch=True))
def test_any_text_gets_a_reward_between_zero_and_one(name, answer):
    assert 0.0 <= accuracy(name, answer, REFERENCES[name]) <= 1.0


boxes = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12), st.integers(1, 12)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a=boxes, b=boxes)
def test_iou_counts_pixels(a, b):
    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    expected = Fraction(len(pixels(a) & pixels(b)), len(pixels(a) | pixels(b)))
    # One division of small integers on either side.
    assert accuracy("box_iou", str(a), str(b)) == pytest.approx(float(expected), abs=1e-15)


def test_a_box_may_come_in_the_paper_s_json():
    assert accuracy("box_iou", '{"boxes": [577, 232, 899, 786]}', "[577, 232, 899, 786]") == 1.0


def test_iou_of_touching_boxes_is_zero_and_far_edges_are_exclusive():
    assert accuracy("box_iou", "[0, 0, 4, 4]", "[4, 0, 8, 4]") == 0.0
    assert accuracy("box_iou", "[0, 0, 4, 4]", "[0, 0, 4, 8]") == 0.5


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [("347", "347", 1.0), ("300", "400", 0.75), ("500", "400", 0.75), ("900", "400", 0.0), ("0", "0", 1.0),
     ("1", "0", 0.0), ("-400", "400", 0.0), ("1,000", "1000", 1.0), ("-3", "-4", 0.75), ("many", "400", 0.0)],
)  # fmt: skip
def test_relative_accuracy_falls_linearly_with_the_relative_error(answer, reference, expected):
    assert accuracy("relative", answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [("12", "12", 1), ("12.0", "12", 1), (" 12. ", "12", 1), ("$1,234.50", "1234.5", 1), ("3/4", "0.75", 1),
     ("50%", "50", 1), ("-3", "3", 0), ("12 13", "12", 0), ("12.001", "12", 0), ("1,23", "123", 0),
     ("0.3333333", "1/3", 1)],
)  # fmt: skip
def test_numeric_compares_values_not_spellings(answer, reference, expected):
    assert accuracy("numeric", answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("left above", 1), ("above left", 1), ("Left, above.", 1), ("left below", 0.5), ("right above", 0.5),
     ("left", 0.5), ("right below", 0), ("left right above", 0.5), ("left right above below", 0), ("leftabove", 0)],
)  # fmt: skip
def test_each_axis_earns_half_and_naming_both_directions_earns_nothing(answer, expected):
    assert accuracy("axes", answer, "left above") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("C", 1), ("c", 1), ("(C)", 1), ("C.", 1), ("C. dogs", 1), ("C: dogs", 1), ("B", 0), ("Cats", 0), ("A. C", 0)],
)
def test_a_choice_is_its_letter(answer, expected):
    assert accuracy("multiple_choice", answer, "C. dogs") == expected


def test_exact_ignores_case_blanks_and_a_full_stop_only():
    assert accuracy("exact", " Blue. ", "blue") == 1.0
    assert accuracy("exact", "dark  blue", "dark blue") == 1.0
    assert accuracy("exact", "blue green", "blue") == 0.0


def test_edit_distance_reward():
    assert accuracy("edit_distance", "7142", "714") == 0.75
    assert accuracy("edit_distance", "", "714") == 0.0
    assert accuracy("edit_distance", "kitten", "sitting") == 1 - 3 / 7


def table_distance(a: str, b: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(a=st.text("abc", min_size=1, max_size=12), b=st.text("abcd", max_size=12))
def test_edit_distance_equals_the_textbook_recursion(a, b):
    # The same division of the same integers.
    assert accuracy("edit_distance", b, a) == 1.0 - table_distance(a, b) / max(len(a), len(b))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=8), b=st.lists(st.sampled_from(["a", "b"])))
def test_ocr_is_the_textbook_distance_of_words(a, b):
    expected = max(0.0, 1.0 - table_distance("".join(a), "".join(b)) / len(a))
    assert accuracy("OCR", " ".join(b), " ".join(a)) == pytest.approx(expected if b else 0.0, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    a=st.lists(st.sampled_from(["running", "runs", "dog", "the"]), min_size=2, max_size=8),
    b=st.lists(st.sampled_from(["run", "dogs", "the", "cat"]), min_size=1, max_size=8),
)
def test_open_ended_is_the_mean_of_what_rouge_score_says(a, b):
    """Of texts in ASCII, where its own tokenizer reads the same words, and of its own ROUGE-L."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(" ".join(a), " ".join(b))
    expected = sum(score.fmeasure for score in scores.values()) / 3
    assert accuracy("open-ended", " ".join(b), " ".join(a)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(a=st.lists(boxes, min_size=1, max_size=4), b=st.lists(boxes, min_size=1, max_size=4))
def test_several_boxes_are_matched_as_well_as_any_order_can(a, b):
    def total(mine, yours):
        return sum(accuracy("box_iou", str(x), str(y)) for x, y in zip(mine, yours, strict=False))

    short, long = sorted((a, b), key=len)
    expected = max(total(short, order) for order in permutations(long, len(short))) / len(long)
    # Sums of at most four numbers in another order.
    assert accuracy("box_iou", str(a), str(b)) == pytest.approx(expected, abs=1e-12)


def test_one_name_of_the_paper_and_one_of_ours_are_the_same_format():
    for answer in ("B", "C. dogs", "dogs", ""):
        assert accuracy("multiple choice", answer, "C. dogs") == accuracy("multiple_choice", answer, "C. dogs")
    assert accuracy("spatial grounding", "[1, 2, 3, 4]", "[1, 2, 3, 5]") == accuracy(
        "box_iou", "[1, 2, 3, 4]", "[1, 2, 3, 5]"
    )


def test_the_error_of_a_reference_shows_the_beginning_of_a_long_one():
    with pytest.raises(ValueError, match=r"xxx\.\.\.' is not a number") as error:
        accuracy("numeric", "5", "x" * 10_000)
    assert len(str(error.value)) < 300


def test_score_answer_tries_a_format_by_hand():
    assert score_answer("math", r"\frac{1}{2}", "0.5") == 1.0
    assert score_answer("exact", "kitten", ["cat", "kitten"]) == 1.0
    assert score_answer("multiple choice", "dogs", "B", extra={"options": ["cats", "dogs"]}) == 1.0
    assert score_answer("multiple choice", "dogs", "B", extra={"options": {"A": "cats", "B": "dogs"}}) == 1.0
    frames = {"box_frame": "relative", "answer_frame": "resized"}
    box = score_answer("box_iou", "[0, 0, 50, 25]", "[0, 0, 500, 500]", resized_sizes=[(100, 50)], extra=frames)
    assert box == 1.0


def test_score_answer_names_the_nearest_of_an_unknown_format():
    with pytest.raises(ValueError, match=r"unknown answer format 'numerik' \(did you mean 'numeric'\?\)"):
        score_answer("numerik", "5", "5")


def test_a_format_sees_the_whole_sample():
    """The size of its images and the dataset's own fields included."""

    def in_picture(answer, sample):
        return float(int(answer) * sample.extra["scale"] <= sample.images[0].width)

    registry.answer_formats.register("in_picture")(in_picture)
    try:
        sample = make_sample(images=[Image.new("RGB", (100, 50))], extra={"scale": 2})
        assert [registry.answer_formats.get("in_picture")(answer, sample) for answer in ("50", "51")] == [1.0, 0.0]
    finally:
        del registry.answer_formats._entries["in_picture"]
