# SPDX-License-Identifier: Apache-2.0
"""Property: every reference of every answer format is worth 1 against itself, in a response of each format."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_g2rpo import registry
from megatron_g2rpo.tasks import response_formats
from tests.common.builtin import builtin_names
from tests.unit.tasks.common import make_rollout, make_sample

RESPONSES = {
    "thinking_answer": "<thinking>So it is.</thinking><answer>{}</answer>",
    "think_answer": "<think>So it is.</think>\n<answer>{}</answer>",
    "think_boxed": "<think>So it is.</think>\nThe answer is \\boxed{{{}}}.",
    "boxed": "So it is \\boxed{{{}}}.",
    "plain": "{}",
}

whole = st.integers(-10_000_000, 10_000_000)
decimal = st.decimals(-100_000, 100_000, places=3).map(str)
fraction = st.tuples(st.integers(-999, 999), st.integers(1, 999))
number = st.one_of(
    whole.map(str),
    decimal,
    whole.map("{:,}".format),
    st.floats(-1e30, 1e30).map(repr),
    fraction.map(lambda f: f"{f[0]}/{f[1]}"),
    fraction.map(lambda f: rf"$\frac{{{f[0]}}}{{{f[1]}}}$"),
    st.tuples(st.integers(1, 99), st.integers(1, 9)).map(lambda f: rf"{f[0]}\frac{{{f[1]}}}{{10}}"),
    st.tuples(decimal, st.sampled_from(["%", r"\%", " percent", " cm", "°", r"^\circ", r"\text{ m}^2", " km/h"])).map(
        "".join
    ),
    whole.map("$${}$$".format),
    whole.map("<answer>{}</answer>".format),
)
letter = st.sampled_from("ABCDEFGHIJ")
choice = st.one_of(
    letter,
    letter.map("({})".format),
    st.tuples(letter, st.sampled_from([". a cat", ") I think", ": E.g. this", "\nB. dog"])).map("".join),
    st.lists(letter, min_size=2, max_size=4, unique=True).map("".join),
    st.lists(letter, min_size=2, max_size=4, unique=True).map(", ".join),
    letter.map("Option {}".format),
    st.integers(1, 99).map(str),
)
# Without what wraps answers, and without braces, which a box must balance.
words = st.text("abcXYZ019 .,;:!?'()-/éü猫١ａ\u200f\n", min_size=1, max_size=40).filter(
    lambda text: text.strip(" \n\u200f")
)
some = st.lists(st.sampled_from(["The dog", "runs", "a", "猫", "été", "5"]), min_size=1, max_size=8).map(" ".join)
texts = st.one_of(words, words.map("<answer>{}</answer>".format), words.map("**{}**".format))
expression = st.one_of(
    number,
    st.sampled_from(
        [r"\pi", r"$\frac{\sqrt{2}}{3}$", r"\{1, 2\}", "[0, 1)", "x = 5", "(1, 2)", "yes", r"x^{2}+1 \leq y", "B"]
    ),
)
corner = st.integers(0, 500)
box = st.tuples(corner, corner, st.integers(1, 500), st.integers(1, 500)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
point = st.lists(st.integers(0, 1000), min_size=2, max_size=2)
span = st.tuples(st.integers(0, 10_000), st.integers(1, 1000)).map(lambda t: [t[0] / 10, (t[0] + t[1]) / 10])
track = st.dictionaries(st.integers(0, 99).map(str), box, min_size=1, max_size=5)
one_box = st.one_of(
    box.map(json.dumps),
    box.map(lambda b: json.dumps({"boxes": b})),
    box.map(lambda b: f"({b[0]},{b[1]}),({b[2]},{b[3]})"),
    box.map(lambda b: f"```json\n{json.dumps([{'bbox_2d': b, 'label': 'dog'}])}\n```"),
)
some_boxes = st.one_of(one_box, st.lists(box, min_size=1, max_size=5).map(json.dumps))
prompt = st.fixed_dictionaries(
    {"boxes": box, "positive_points": st.lists(point, max_size=3), "negative_points": st.lists(point, max_size=3)},
    optional={"time": st.floats(0, 1000)},
)
REFERENCES = {
    "OCR": texts,
    "axes": st.sampled_from(["left", "above", "left above", "Below, right"]),
    "box_iou": some_boxes,
    "edit_distance": texts,
    "exact": texts,
    "math": expression,
    "multiple choice": choice,
    "multiple_choice": choice,
    "numeric": number,
    "numerical": number,
    "open-ended": some,
    "point_in_box": one_box,
    "points": st.one_of(point.map(json.dumps), st.lists(point, min_size=1, max_size=5).map(json.dumps)),
    "regression": number,
    "relative": number,
    "segmentation": prompt.map(json.dumps),
    "spatial grounding": some_boxes,
    "spatial-temporal grounding": st.fixed_dictionaries({"time": span, "boxes": track}).map(json.dumps),
    "temporal grounding": st.one_of(span.map(json.dumps), span.map(lambda t: json.dumps({"time": t}))),
    "tracking": track.map(lambda t: json.dumps({"boxes": t})),
}


def test_every_format_has_references_and_responses_here():
    assert REFERENCES.keys() == builtin_names(registry.answer_formats)
    assert RESPONSES.keys() == builtin_names(registry.response_formats)


@pytest.mark.parametrize("name", sorted(REFERENCES))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_reference_is_worth_one_against_itself_in_each_response_format(name, data):
    reference = data.draw(REFERENCES[name])
    for response_format, template in RESPONSES.items():
        rollout = make_rollout(template.format(reference))
        answer = response_formats.get(response_format).read(rollout).answer
        got = registry.answer_formats.get(name)(answer or "", make_sample(answer=reference, answer_format=name))
        # A sum of the weights 0.3, 0.3, 0.2 and 0.2, or of sixth parts, is rounded.
        assert got == pytest.approx(1.0, abs=1e-12), (response_format, answer)


@pytest.mark.parametrize("text", [r"\boxed{5}", r"The answer is \boxed{5}.", r"**\boxed{5}**", r"$\boxed{\text{5}}$"])
def test_a_box_inside_of_answer_tags_is_read(text):
    answer = (
        response_formats.get("thinking_answer").read(make_rollout(RESPONSES["thinking_answer"].format(text))).answer
    )
    for name in ("numeric", "exact", "math", "numerical", "regression", "relative"):
        assert registry.answer_formats.get(name)(answer or "", make_sample(answer="5")) == 1.0


def test_an_answer_that_the_token_limit_cut_is_no_answer():
    cut = make_rollout("<thinking>So it is.</thinking><answer>5", truncated=True)
    assert response_formats.get("thinking_answer").read(cut).answer is None
    answer = response_formats.get("plain").read(make_rollout("<answer>5")).answer
    for name in ("numeric", "exact", "math", "numerical", "regression", "relative"):
        assert registry.answer_formats.get(name)(answer or "", make_sample(answer="5")) == 0.0
