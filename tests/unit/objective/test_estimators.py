# SPDX-License-Identifier: Apache-2.0
"""Estimators by name: golden values, and names and options that do not exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_g2rpo.objective import estimators, gaussian_advantages
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.rows import as_rows


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0, 0, 0, 0, 1], [-0.5] * 4 + [2.0]), ([0, 0, 1, 1, 1], [-1.2247] * 2 + [0.8165] * 3)],
)
def test_grpo_reproduces_the_papers_rows(rewards: list[float], expected: list[float]) -> None:
    """arXiv 2604.08539, method figure; printed to 4 digits, hence half a unit of the fourth."""
    zeros = torch.zeros(5, dtype=torch.int64)
    actual = estimators.get("grpo")(as_rows(torch.tensor(rewards, dtype=torch.float32), zeros, zeros), History())
    np.testing.assert_allclose(actual, expected, atol=5e-5, rtol=0)


def test_grpo_standardises_each_group_and_gives_equal_rewards_exactly_zero() -> None:
    rewards = torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1, 2.0, 0.1 + 1e-8], dtype=torch.float64)
    groups = torch.tensor([9, -4, 9, -4, 9, -4, 9])
    actual = estimators.get("grpo")(as_rows(rewards, groups, groups), History())
    assert actual[groups == 9].tolist() == [0.0] * 4
    # 1e-15: one subtraction and one division of numbers of order 1.
    assert actual[groups == -4].tolist() == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0], abs=1e-15)


def test_g2rpo_is_the_gaussian_advantage() -> None:
    rewards, groups = torch.tensor([0.0, 1.0, 1.0, 0.5]), torch.tensor([0, 0, 0, 1])
    actual = estimators.get("g2rpo")(as_rows(rewards, groups, groups), History())
    assert torch.equal(actual, gaussian_advantages(rewards, groups, groups))
    assert estimators.options("g2rpo") == ("stages", "tie_tolerance", "zero_variance", "variance")


def test_bind_fills_in_options() -> None:
    rewards, ids = torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.int64)
    bound = estimators.bind("g2rpo", stages=["group"], variance="unit")
    assert torch.equal(
        bound(as_rows(rewards, ids, ids), History()),
        gaussian_advantages(rewards, ids, ids, stages=["group"], variance="unit"),
    )


def test_unknown_names_and_options_are_errors_that_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown advantage estimator 'g2rp' \(did you mean 'g2rpo'\?\); known: .*grpo"
    ):
        estimators.get("g2rp")
    with pytest.raises(ValueError, match=r"'grpo' takes no option 'tie_tolerence' \(did you mean 'tie_tolerance'\?\)"):
        estimators.bind("grpo", tie_tolerence=0.1)
    with pytest.raises(ValueError, match="'grpo' is registered twice"):
        estimators.register("grpo")(gaussian_advantages)
