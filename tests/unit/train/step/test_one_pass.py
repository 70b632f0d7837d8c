# SPDX-License-Identifier: Apache-2.0
"""Claim: old log-probabilities that are the update's own change nothing, and save a forward pass.

In one process; ``tests/parallel/test_one_pass.py`` is the same over ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.one_pass import CASES, ROW, ROWS, Taken, differences, recipe_of, take_step
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    return directory


def both(directory: Path, keys: tuple[str, ...], row_tokens: int, updates: int = 1) -> tuple[Taken, Taken]:
    own, beforehand = (
        take_step(layout_options(directory), recipe_of(*keys), row_tokens, beforehand=first, updates=updates)
        for first in (False, True)
    )
    return own, beforehand


@pytest.mark.parametrize("case", CASES)
def test_an_update_s_own_old_logprobs_give_the_same_bits(directory: Path, case: str) -> None:
    """Every metric and every weight: the forward pass with gradient computes what the one without does."""
    own, beforehand = both(directory, *CASES[case])
    assert differences(own, beforehand) == []
    assert own.passes == beforehand.passes - 1
    assert own.metrics["0 train/ratio"] == 1.0
    if "masked" in case:
        assert 0.0 < own.metrics["train/importance_masked"] < 1.0, "the correction should have something to do"
    if "entropy" in case:
        assert {own.metrics[f"0 train/{task}/entropy_side"] for task in "ab"} == {1.0, -1.0}


def test_later_updates_are_measured_against_the_policy_that_sampled(directory: Path) -> None:
    """The first of two updates needs no pass; the second's old log-probabilities, and fresh sides, are the same."""
    keys, row_tokens = CASES["entropy shaping, one row"]
    own, beforehand = both(directory, keys, row_tokens, updates=2)
    assert differences(own, beforehand) == []
    assert own.metrics["1 train/ratio"] != 1.0
    # One for the second update's rows. Beforehand: one for the rows of both; in both cases the second's entropies are
    # those of its own forward pass.
    assert (own.passes, beforehand.passes) == (1, 1)


def test_shaping_over_several_rows_computes_entropies_first(directory: Path) -> None:
    """Else the first row's side would be its own: the entropies of the others are not known yet."""
    keys, _ = CASES["entropy shaping, one row"]
    own, beforehand = both(directory, keys, ROWS)
    assert own.passes == beforehand.passes == 1
    one_row = take_step(layout_options(directory), recipe_of(*keys), ROW, beforehand=False)
    for name in ("loss", "grad_norm", "entropy_loss"):
        # float32 sums in another order.
        assert own.metrics[f"0 train/{name}"] == pytest.approx(one_row.metrics[f"0 train/{name}"], rel=1e-5)


def test_old_logprobs_of_other_weights_would_be_noticed(directory: Path) -> None:
    """A second update whose old log-probabilities were its own: the ratio would be 1, whatever the first had moved."""
    keys, row_tokens = CASES["entropy shaping, one row"]
    step = take_step(layout_options(directory), recipe_of(*keys), row_tokens, beforehand=False, updates=2)
    assert abs(step.metrics["1 train/ratio"] - 1.0) > 1e-4
    assert step.metrics["1 train/kl"] > 0.0
