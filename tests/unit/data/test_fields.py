# SPDX-License-Identifier: Apache-2.0
"""Fields in the types that people write are brought to those of a sample, or refused by field and sample."""

import json
import re

import pytest

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.fields import MAX_CHARACTERS, REQUIRED_FIELDS, checked_fields

PLAIN = {"task": "vqa", "question": "What?", "answer": "cat", "answer_format": "exact", "images": ["0.png"]}


def test_fields_of_the_right_types_stay_as_they_are():
    own = {"source": None, "difficulty": float("inf"), "steps": [1, None]}
    for fields in (PLAIN, PLAIN | {"response": "r"}, PLAIN | own, PLAIN | {"question": ""}):
        assert checked_fields(fields, "s") == fields


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (3, "3"),
        (3.0, "3.0"),
        (-0.25, "-0.25"),
        (1e-7, "1e-07"),
        ([1, 2.5, 3, 4], "[1, 2.5, 3, 4]"),
        (["cat", "größer"], '["cat", "größer"]'),
        ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
        ({"bbox": [1, 2, 3, 4]}, '{"bbox": [1, 2, 3, 4]}'),
    ],
)
def test_an_answer_of_another_type_becomes_the_text_that_formats_read(answer, text):
    assert checked_fields(PLAIN | {"answer": answer}, "s")["answer"] == text


@pytest.mark.parametrize("images", [None, [], ()])
def test_no_images_may_be_written_as_null_or_an_empty_list_or_left_out(images):
    assert checked_fields(PLAIN | {"images": images}, "s")["images"] == []
    assert checked_fields({k: v for k, v in PLAIN.items() if k != "images"}, "s")["images"] == []


def test_one_name_of_an_image_is_a_list_of_it():
    assert checked_fields(PLAIN | {"images": "0.png"}, "s")["images"] == ["0.png"]


def test_a_number_as_task_becomes_text_and_a_null_response_is_none():
    assert checked_fields(PLAIN | {"task": 7}, "s")["task"] == "7"
    assert checked_fields(PLAIN | {"response": None}, "s")["response"] is None


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_a_missing_or_null_field_is_named(field):
    with pytest.raises(SampleError, match=f"^shard s, sample 'a': lacks the field '{field}'"):
        checked_fields({k: v for k, v in PLAIN.items() if k != field}, "shard s, sample 'a'")
    with pytest.raises(SampleError, match=f"^s: field '{field}' is null"):
        checked_fields(PLAIN | {field: None}, "s")


NESTED: list = []
for _ in range(100_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", True, "is true; write the text that is meant"),
        ("answer", False, "is false; write the text that is meant"),
        ("answer", float("nan"), "is nan; write a finite number"),
        ("answer", float("-inf"), "is -inf; write a finite number"),
        ("answer", ["cat", None], "is a list with null in it"),
        ("answer", [True], "is a list with true in it"),
        ("answer", [1.0, float("nan")], "cannot be written as JSON"),
        ("answer", {"a": {1, 2}}, "cannot be written as JSON"),
        ("answer", NESTED, "cannot be written as JSON"),
        ("answer", b"cat", "must be a text, not a value of type bytes"),
        ("answer", ["\ud800"], "is no valid Unicode"),
        ("question", 5, "must be a text, not a number"),
        ("question", ["What?"], "must be a text, not a list"),
        ("question", {"text": "What?"}, "must be a text, not an object"),
        ("question", float("nan"), "must be a text, not a number"),
        ("question", "half \ud800", "is no valid Unicode: .* at character 5"),
        ("question", "x" * (MAX_CHARACTERS + 1), "has 1,048,577 characters"),
        ("response", "x" * (MAX_CHARACTERS + 1), "has 1,048,577 characters"),
        ("response", 5, "must be a text, not a number"),
        ("response", "\udfff", "is no valid Unicode"),
        ("task", True, "must be a text, not true"),
        ("task", [], "must be a text, not a list"),
        ("task", " ", "is blank"),
        ("task", "\ud800", "is no valid Unicode"),
        ("answer_format", 5, "must be a text, not a number"),
        ("answer_format", ["exact"], "must be a text, not a list"),
        ("answer_format", "", "is blank"),
        ("images", 5, "must be a list of names, not a number"),
        ("images", {"0": "0.png"}, "must be a list of names, not an object"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_names_of_field_and_sample(field, value, message):
    with pytest.raises(SampleError, match=f"^shard s, sample 'a': field '{field}' {message}"):
        checked_fields(PLAIN | {field: value}, "shard s, sample 'a'")


def test_an_image_of_a_list_that_is_no_name_is_numbered():
    with pytest.raises(SampleError, match=re.escape("s: field 'images[1]' must be a text, not null")):
        checked_fields(PLAIN | {"images": ["0.png", None]}, "s")


def test_the_result_can_be_written_as_json():
    assert json.loads(json.dumps(checked_fields(PLAIN | {"answer": 3}, "s")))["answer"] == "3"
