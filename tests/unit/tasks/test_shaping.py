# SPDX-License-Identifier: Apache-2.0
"""Length trapezoid and structure bonus."""

import numpy as np
import pytest

from megatron_g2rpo.tasks.shaping import structure_bonus, trapezoid


def test_the_trapezoid_is_the_linear_interpolation_of_its_corners():
    corners = (4, 10, 24, 40)
    lengths = np.arange(0, 50)
    expected = np.interp(lengths, corners, (0, 1, 1, 0))
    # One subtraction and one division against numpy's slope form: a few units in the last place.
    np.testing.assert_allclose([trapezoid(n, *corners) for n in lengths], expected, atol=1e-15)


def test_where_bounds_coincide_the_plateau_wins():
    assert [trapezoid(n, 0, 0, 2, 2) for n in (0, 2, 3)] == [1.0, 1.0, 0.0]
    assert [trapezoid(n, 3, 3, 3, 3) for n in (2, 3, 4)] == [0.0, 1.0, 0.0]


def test_bounds_out_of_order_are_an_error():
    with pytest.raises(ValueError, match="0, 24, 4, 40 are not in ascending order"):
        trapezoid(5, 0, 24, 4, 40)


@pytest.mark.parametrize(
    ("thinking", "thirds"),
    [("7 + 5", 3), ("7+5", 3), ("I see 7 + 5", 3), ("7 - 5", 2), ("5 + 7", 1), ("7 + 6", 2), ("3 * 4", 0),
     ("7 5", 0), ("", 0), ("12", 0), ("1 + 1, 7 + 5", 1), ("7 + 5 = 12", 3)],
)  # fmt: skip
def test_structure_counts_operands_and_operator_of_the_first_step(thinking, thirds):
    response = f"<thinking>{thinking}</thinking><answer>12</answer>"
    assert structure_bonus(response, "7 + 5") == thirds / 3


def test_steps_are_compared_in_order():
    response = "<thinking>7 + 5 = 12; 12 × 3 = 36</thinking><answer>36</answer>"
    assert structure_bonus(response, "7 + 5, 12 * 2") == 5 / 6
    assert structure_bonus(response, "12 * 3, 7 + 5") == 0


def test_the_answer_section_states_no_steps():
    assert structure_bonus("<thinking></thinking><answer>7 + 5</answer>", "7 + 5") == 0


def test_a_reference_without_steps_is_an_error():
    with pytest.raises(ValueError, match="'seven' state no step"):
        structure_bonus("<thinking>7 + 5</thinking>", "seven")
