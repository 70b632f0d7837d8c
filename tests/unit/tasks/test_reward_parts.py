# SPDX-License-Identifier: Apache-2.0
"""What each reward part gives, alone."""

from __future__ import annotations

import pytest

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.reward_parts import PartSettings, accuracy, length, overlong, structure, well_formed
from tests.unit.tasks.common import BOUNDS, make_response, make_sample

BOXES = '{"boxes": {"1": [1, 2, 3, 4], "2": [5, 6, 7, 8]}}'


def settings(**changes: object) -> PartSettings:
    given = {"answer_format": None, "length": BOUNDS, "max_response_tokens": 32, "overlong_buffer": 8}
    return PartSettings(**(given | changes))  # type: ignore[arg-type]


def test_the_first_five_are_registered() -> None:
    assert {"accuracy", "format", "length", "structure", "overlong"} <= set(registry.reward_parts.names())


def test_accuracy_is_that_of_the_answer_format() -> None:
    sample = make_sample(answer="20")
    assert accuracy(sample, make_response(answer="20"), settings=settings()) == 1.0
    assert accuracy(sample, make_response(answer="10"), settings=settings()) == 0.0
    assert accuracy(sample, make_response(answer="10"), settings=settings(answer_format="relative")) == 0.5
    assert accuracy(sample, make_response(answer=None), settings=settings()) == 0.0


@pytest.mark.parametrize("answer", [None, "12"])
def test_accuracy_of_a_broken_reference_is_an_error_with_or_without_an_answer(answer: str | None) -> None:
    with pytest.raises(ValueError, match="reference answer 'a dozen' is not a number"):
        accuracy(make_sample(answer="a dozen"), make_response(answer=answer), settings=settings())


def test_format_is_whether_the_response_is_well_formed() -> None:
    assert well_formed(make_sample(), make_response(is_well_formed=True)) == 1.0
    assert well_formed(make_sample(), make_response(is_well_formed=False)) == 0.0


def test_length_is_the_trapezoid_of_the_task() -> None:
    values = [length(make_sample(), make_response(num_tokens=n), settings=settings()) for n in (0, 2, 6, 12, 16)]
    assert values == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert length(make_sample(), make_response(num_tokens=6), settings=settings(length=None)) == 0.0


def test_overlong_falls_over_the_buffer_before_the_limit() -> None:
    values = [overlong(make_sample(), make_response(num_tokens=n), settings=settings()) for n in (1, 24, 26, 28, 32)]
    assert values == [0.0, 0.0, -0.25, -0.5, -1.0]
    with pytest.raises(ValueError, match=r"needs grpo\.overlong_penalty\.buffer"):
        overlong(make_sample(), make_response(), settings=settings(overlong_buffer=None))


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("[1, 2, 3, 4]", "[5, 6, 7, 8]", 1.0),
        ("[1, 2, 3, 4]", "[5, 6, 7]", 0.0),
        ("[1, 2, 3, 4]", "5, 6, 7, 8", 0.0),
        ("[1, 2, 3, 4]", '{"boxes": [1, 2, 3, 4]}', 0.0),
        ("[1, 2, 3, 4]", "[1, 2, 3, NaN]", 0.0),
        ('{"boxes": [1, 2, 3, 4]}', '{"boxes": [9, 9, 9, 9]}', 1.0),
        ('{"boxes": [1, 2, 3, 4]}', '{"box": [9, 9, 9, 9]}', 0.0),
        ('{"boxes": [1, 2, 3, 4]}', '{"boxes": [9, 9', 0.0),
        ('{"boxes": [1, 2, 3, 4]}', "[9, 9, 9, 9]", 0.0),
        (BOXES, '{"boxes": {"1": [], "2": []}}', 1.0),
        (BOXES, '{"boxes": {"2": [], "3": [], "4": []}}', 0.5 + 0.5 / 4),
        (BOXES, '{"boxes": []}', 0.5),
        ("12", "12", 0.0),
        ("blue", "blue", 0.0),
        ("blue", "[1]", 0.0),
        ("[1]", "[" * 100_000, 0.0),
        ("[1]", "9" * 5000, 0.0),
        ("[1]", None, 0.0),
    ],
)
def test_structure_is_whether_the_answer_is_json_of_the_reference_s_form(
    reference: str, answer: str | None, expected: float
) -> None:
    sample = make_sample(answer=reference)
    assert structure(sample, make_response(answer=answer)) == expected
    assert structure(sample, make_response(answer=answer, is_well_formed=False)) == 0.0
