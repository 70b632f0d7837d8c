# SPDX-License-Identifier: Apache-2.0
"""What counts as a well-formed response, and which section is the answer."""

import pytest

from megatron_g2rpo.tasks.parsing import find_answer, find_thinking, is_well_formed

GOOD = "<thinking>7 + 5</thinking><answer>12</answer>"


@pytest.mark.parametrize(
    "text", [GOOD, f"\n {GOOD} \n", GOOD.replace("><", ">\n<"), "<thinking>a\nb</thinking><answer></answer>"]
)
def test_well_formed(text):
    assert is_well_formed(text)


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
def test_not_well_formed(text):
    assert not is_well_formed(text)


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
def test_the_answer_is_the_last_complete_section(text, answer):
    assert find_answer(text) == answer


def test_the_thinking_is_the_first_complete_section():
    assert find_thinking("<thinking> a </thinking><thinking>b</thinking>") == "a"
    assert find_thinking("a</thinking>") is None
