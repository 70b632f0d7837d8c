# SPDX-License-Identifier: Apache-2.0
"""The chat that asks a sample: its turns, their order, and where the instruction stands."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.prompts import build_messages, continuation
from megatron_g2rpo.tasks.response_formats import ResponseFormat, Tagged
from tests.unit.tasks.common import make_sample


def turn(role: str, *content: str | None) -> dict[str, Any]:
    """None stands for an image."""
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return {"role": role, "content": parts}


class InSystem(Tagged):
    placement = "system"


def in_system() -> ResponseFormat:
    return InSystem(thinking="a", answer="b")


def test_the_system_prompt_comes_first_and_images_before_the_question() -> None:
    sample = make_sample(question="What?", images=(object(), object()))
    user = turn("user", None, None, "What?")
    assert build_messages(sample) == [user]
    assert build_messages(sample, "Be brief.") == [turn("system", "Be brief."), user]


@pytest.mark.parametrize("name", ["boxed", "plain", "think_answer", "think_boxed", "thinking_answer"])
def test_the_instruction_follows_the_question(name: str) -> None:
    shape = response_formats.get(name)
    user = turn("user", None, f"What?\n\n{shape.instruction}")
    sample = make_sample(question="What?", images=(object(),))
    assert build_messages(sample, None, shape) == [user]
    assert build_messages(sample, "Be brief.", shape) == [turn("system", "Be brief."), user]


def test_an_instruction_of_the_system_comes_after_the_system_prompt() -> None:
    shape, sample = in_system(), make_sample(question="What?")
    assert build_messages(sample, None, shape) == [turn("system", shape.instruction), turn("user", "What?")]
    assert build_messages(sample, "Be brief.", shape) == [
        turn("system", f"Be brief.\n\n{shape.instruction}"),
        turn("user", "What?"),
    ]


@pytest.mark.parametrize(
    ("question", "images", "content"),
    [
        ("<image>What?", 1, (None, "What?")),
        ("<image>\nWhat?", 1, (None, "\nWhat?")),
        ("The first image:<image> the second:<image>", 2, ("The first image:", None, " the second:", None)),
        ("<image><image>?", 2, (None, None, "?")),
        ("<image>", 1, (None,)),
        ("What?", 2, (None, None, "What?")),
        ("< image > and <IMAGE> are text", 1, (None, "< image > and <IMAGE> are text")),
    ],
)
def test_an_image_stands_where_the_question_has_its_tag(question: str, images: int, content: tuple[Any, ...]) -> None:
    sample = make_sample(question=question, images=tuple(object() for _ in range(images)))
    assert build_messages(sample) == [turn("user", *content)]
    instructed = build_messages(sample, None, response_formats.get("plain"))[0]["content"]
    instruction = f"\n\n{response_formats.get('plain').instruction}"
    if content[-1] is None:
        assert instructed == turn("user", *content, instruction)["content"]
    else:
        assert instructed == turn("user", *content[:-1], content[-1] + instruction)["content"]


@pytest.mark.parametrize(("question", "images"), [("<image>?", 0), ("<image>?", 2), ("<image> <image>", 1)])
def test_tags_and_images_of_different_number_are_an_error_with_both(question: str, images: int) -> None:
    sample = make_sample(question=question, images=tuple(object() for _ in range(images)))
    tags = question.count("<image>")
    with pytest.raises(ValueError, match=f"the question has {tags} <image> tags, but the sample {images} images"):
        build_messages(sample)


def test_a_format_without_an_instruction_adds_nothing() -> None:
    silent = in_system()
    silent.instruction = ""
    assert build_messages(make_sample(question="What?"), None, silent) == [turn("user", "What?")]


@pytest.mark.parametrize(
    ("response", "prefix", "rest"),
    [
        ("<think>\n7</think>12", "<think>\n", "7</think>12"),
        ("<think>7</think>12", "<think>\n", "7</think>12"),
        ("7</think>12", "<think>\n", "7</think>12"),
        ("<think>7</think>12", "", "<think>7</think>12"),
    ],
)
def test_what_the_prompt_has_begun_is_not_taught_again(response: str, prefix: str, rest: str) -> None:
    assert continuation(response, prefix) == rest
