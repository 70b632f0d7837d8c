# SPDX-License-Identifier: Apache-2.0
"""Where each response format finds thinking and answer, what it calls well formed, and what it tells the model."""

from __future__ import annotations

import time

import pytest

from megatron_g2rpo import registry
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.boxed import find_boxed
from tests.unit.tasks.common import make_env, make_rollout, make_task

GOOD = "<thinking>7 + 5</thinking><answer>12</answer>"
NAMES = ("boxed", "plain", "think_answer", "think_boxed", "thinking_answer")
# A response that keeps to each format, with the thinking "7 + 5" where there is one, and the answer "12".
KEEPING = {
    "thinking_answer": GOOD,
    "think_answer": "<think>\n7 + 5\n</think>\n\n<answer>12</answer>",
    "think_boxed": "<think>\n7 + 5\n</think>\n\nIt is $\\boxed{12}$.",
    "boxed": "7 + 5 \\boxed{12}",
    "plain": " 12\n",
}
# What a response must hold for the instruction to be about this format.
MARKS = {
    "thinking_answer": ("<thinking>", "</thinking>", "<answer>", "</answer>"),
    "think_answer": ("<think>", "</think>", "<answer>", "</answer>"),
    "think_boxed": ("<think>", "</think>", "\\boxed{}"),
    "boxed": ("\\boxed{}",),
    "plain": ("nothing else",),
}


def test_every_format_has_a_case_here() -> None:
    builtin = [name for name in registry.response_formats.names() if "megatron_g2rpo" in _place(name)]
    assert sorted(builtin) == sorted(NAMES) == sorted(KEEPING) == sorted(MARKS)


def _place(name: str) -> str:
    return registry.response_formats.entry(name).place.rpartition("/")[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_response_that_keeps_to_the_format_is_read_whole(name: str) -> None:
    response = response_formats.get(name).read(make_rollout(KEEPING[name], num_tokens=9, truncated=True))
    assert response.is_well_formed
    assert response.answer == "12"
    assert response.thinking == (None if name == "plain" else "7 + 5")
    assert (response.text, response.num_tokens, response.truncated, response.sample_index) == (
        KEEPING[name], 9, True, 3,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_instruction_names_what_the_format_looks_for(name: str) -> None:
    shape = response_formats.get(name)
    assert shape.placement == "question"
    for mark in MARKS[name]:
        assert mark in shape.instruction
    assert shape.opening in shape.instruction


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_response_holds_no_answer(name: str) -> None:
    response = response_formats.get(name).read(make_rollout(""))
    assert (response.answer, response.thinking) == (None, None)
    assert response.is_well_formed == (name == "plain")


@pytest.mark.parametrize("name", ["thinking_answer", "think_answer", "think_boxed"])
def test_an_opening_tag_that_the_prompt_ends_with_counts_as_present(name: str) -> None:
    shape = response_formats.get(name)
    begun, rest = shape.opening, KEEPING[name].removeprefix(shape.opening)
    for prefix in (begun, f"{begun}\n"):
        response = shape.read(make_rollout(rest, prefix=prefix))
        assert response.is_well_formed
        assert (response.thinking, response.answer, response.text) == ("7 + 5", "12", rest)
    assert not shape.read(make_rollout(rest)).is_well_formed
    # Said by the prompt and again by the response: that is twice.
    assert not shape.read(make_rollout(KEEPING[name], prefix=begun)).is_well_formed


@pytest.mark.parametrize("name", ["think_answer", "think_boxed"])
def test_a_prompt_may_have_ended_the_thinking(name: str) -> None:
    """What Qwen3's template writes for `enable_thinking=False`."""
    answer = KEEPING[name].partition("</think>")[2]
    response = response_formats.get(name).read(make_rollout(answer, prefix="<think>\n\n</think>\n\n"))
    assert response.is_well_formed
    assert (response.thinking, response.answer) == ("", "12")


@pytest.mark.parametrize("name", ["thinking_answer", "boxed", "plain"])
def test_a_tag_of_another_format_in_the_prompt_is_no_part_of_the_response(name: str) -> None:
    shape = response_formats.get(name)
    assert shape.read(make_rollout(KEEPING[name], prefix="<think>\n")) == shape.read(make_rollout(KEEPING[name]))


# -- tags --------------------------------------------------------------------------------------------------------------


def tagged(text: str, name: str) -> str:
    """The cases below are in the tags of `thinking_answer`."""
    return text if name == "thinking_answer" else text.replace("thinking>", "think>")


@pytest.mark.parametrize("name", ["thinking_answer", "think_answer"])
@pytest.mark.parametrize(
    "text", [GOOD, f"\n {GOOD} \n", GOOD.replace("><", ">\n<"), "<thinking>a\nb</thinking><answer></answer>"]
)
def test_well_formed(text: str, name: str) -> None:
    assert response_formats.get(name).is_well_formed(tagged(text, name))


@pytest.mark.parametrize("name", ["thinking_answer", "think_answer"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "<answer>12</answer>",
        "<thinking>7 + 5</thinking>",
        "<answer>12</answer><thinking>7 + 5</thinking>",
        GOOD + GOOD,
        GOOD + "<answer>13</answer>",
        "so: " + GOOD,
        GOOD + ".",
        GOOD.replace("><", "> then <"),
        GOOD.removesuffix("</answer>"),
        "<thinking>7 <answer>12</answer></thinking>",
        "<thinking><thinking>7</thinking><answer>12</answer>",
        GOOD.upper(),
    ],
)
def test_not_well_formed(text: str, name: str) -> None:
    assert not response_formats.get(name).is_well_formed(tagged(text, name))


def test_the_tags_of_one_format_are_none_of_the_other() -> None:
    one, other = response_formats.get("thinking_answer"), response_formats.get("think_answer")
    assert not one.is_well_formed(KEEPING["think_answer"])
    assert not other.is_well_formed(GOOD)
    assert other.find_thinking(GOOD) is None


@pytest.mark.parametrize("name", ["thinking_answer", "think_answer"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "12"),
        ("<answer> 12\n</answer>", "12"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>12", None),
        ("12", None),
        ("</answer>12<answer>", None),
    ],
)
def test_the_answer_is_the_last_complete_section(text: str, answer: str | None, name: str) -> None:
    assert response_formats.get(name).find_answer(tagged(text, name)) == answer


@pytest.mark.parametrize("name", ["thinking_answer", "think_answer"])
def test_the_thinking_is_the_first_complete_section(name: str) -> None:
    shape = response_formats.get(name)
    assert shape.find_thinking(tagged("<thinking> a </thinking><thinking>b</thinking>", name)) == "a"
    assert shape.find_thinking(tagged("a</thinking>", name)) is None


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{12}", "12"),
        ("so $\\boxed{ \\frac{1}{2} }$", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{}", "\\{"),
        ("\\boxed{{a}{b}}", "{a}{b}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{a \\boxed{2}}", "2"),
        ("\\boxed{12} and \\boxed{1", "12"),
        ("{ \\boxed{5}", "5"),
        ("} \\boxed{5}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{ {5}", None),
        ("\\boxed{5", None),
        ("boxed{5}", None),
        ("\\boxed 5", None),
        ("12", None),
    ],
)
def test_the_answer_is_in_the_last_complete_box(text: str, answer: str | None) -> None:
    assert find_boxed(text) == answer
    assert response_formats.get("boxed").find_answer(text) == answer
    assert response_formats.get("boxed").is_well_formed(text) == (answer is not None)


def test_a_response_that_repeats_a_box_without_end_is_read_in_one_pass() -> None:
    """Quadratic work on 350,000 characters would take minutes; this takes a fraction of a second."""
    start = time.perf_counter()
    assert find_boxed("\\boxed{" * 50_000) is None
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        ("<think>7</think>\\boxed{12}", "12", True),
        ("\n<think>7</think> so \\boxed{1}, no, \\boxed{12}", "12", True),
        ("\\boxed{12}", "12", False),
        ("<think>\\boxed{12}</think> so", None, False),
        ("<think>\\boxed{12}", None, False),
        ("so <think>7</think>\\boxed{12}", "12", False),
        ("<think>7</think><think>8</think>\\boxed{12}", "12", False),
        ("<think>7</think>\\boxed{12", None, False),
    ],
)
def test_a_box_counts_after_the_thinking(text: str, answer: str | None, well_formed: bool) -> None:
    shape = response_formats.get("think_boxed")
    assert shape.find_answer(text) == answer
    assert shape.is_well_formed(text) == well_formed


# -- by name -----------------------------------------------------------------------------------------------------------


def test_a_task_may_have_a_format_of_its_own() -> None:
    env = make_env({"accuracy": 1.0}, math=make_task(response_format="boxed"), ocr=make_task())
    formats = response_formats.by_task(env, "plain")
    assert {task: type(shape).__name__ for task, shape in formats.items()} == {"math": "Boxed", "ocr": "Plain"}


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown response format 'think_box' \(did you mean 'think_boxed'\?\)"):
        response_formats.get("think_box")
