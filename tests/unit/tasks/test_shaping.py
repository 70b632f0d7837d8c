# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a response's length."""

import numpy as np
import pytest

from megatron_g2rpo.tasks.shaping import trapezoid


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
