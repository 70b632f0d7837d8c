# SPDX-License-Identifier: Apache-2.0
"""What holds for every estimator: names, options, order of rows, extremes, rows without rewards; rows and history.

Their values are in test_reward_estimators.py and test_component_estimators.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_g2rpo.objective import estimators, gaussian_advantages
from megatron_g2rpo.objective.history import History, Moments
from megatron_g2rpo.objective.reward_batch import RewardBatch, as_reward_batch

LIMITS = np.iinfo(np.int64)
NAMES = estimators.names()


def random_rows(seed: int, order: np.ndarray | None = None) -> RewardBatch:
    """96 rollouts of 12 prompts and 3 tasks with three components; ties and all-equal groups abound."""
    rng = np.random.default_rng(seed)
    parts = {name: rng.integers(0, np.repeat(rng.integers(1, 6, 12), 8)) * 0.1 for name in ("accuracy", "format")}
    parts["length"] = np.where(np.repeat(rng.random(12) < 0.3, 8), 0.5, rng.normal(size=96))
    rewards = 0.9 * parts["accuracy"] + 0.1 * parts["format"] + 0.3 * parts["length"]
    groups = np.repeat(rng.integers(LIMITS.min, LIMITS.max, 12), 8)
    tasks = np.repeat(rng.choice([-7, 3, LIMITS.max], 12), 8)
    order = rng.permutation(96) if order is None else order
    return as_reward_batch(
        rewards[order], groups[order], tasks[order], {name: part[order] for name, part in parts.items()}
    )


def shuffled(rows: RewardBatch, order: torch.Tensor) -> RewardBatch:
    parts = {name: part[order] for name, part in rows.parts.items()}
    return as_reward_batch(rows.rewards[order], rows.group_ids[order], rows.task_ids[order], parts)


def scaled(rows: RewardBatch, exponent: int) -> RewardBatch:
    """Each column brought to a largest magnitude in [1/2, 1) and then multiplied by ``2**exponent``: exact."""

    def column(values: torch.Tensor) -> np.ndarray:
        return np.ldexp(values.numpy(), exponent - np.frexp(values.abs().max().item())[1])

    parts = {name: column(part) for name, part in rows.parts.items()}
    return as_reward_batch(column(rows.rewards), rows.group_ids, rows.task_ids, parts)  # type: ignore[arg-type]


def test_the_known_estimators_and_which_of_them_read_parts() -> None:
    assert set(NAMES) >= {
        "dr_grpo", "ema_grpo", "g2_gdpo", "g2rpo", "gdpo", "grpo", "reinforce_plus_plus", "rloo"
    }  # fmt: skip
    assert {name for name in NAMES if estimators.uses_parts(name)} == {"g2_gdpo", "gdpo"}
    assert tuple(estimators.options("g2rpo")) == ("stages", "tie_tolerance", "zero_variance", "variance")
    assert tuple(estimators.options("ema_grpo")) == ("ema_decay", "min_std")


def test_bind_fills_in_options() -> None:
    rewards, ids = torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.int64)
    bound = estimators.bind("g2rpo", stages=["group"], variance="unit")
    expected = gaussian_advantages(rewards, ids, ids, stages=["group"], variance="unit")
    assert torch.equal(bound(as_reward_batch(rewards, ids, ids), History()), expected)


def test_unknown_names_and_options_are_errors_that_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown advantage estimator 'g2rp' \(did you mean 'g2rpo'\?\); known: .*grpo"
    ):
        estimators.get("g2rp")
    with pytest.raises(ValueError, match=r"'grpo' takes no option 'tie_tolerence' \(did you mean 'tie_tolerance'\?\)"):
        estimators.bind("grpo", tie_tolerence=0.1)
    places = r"'grpo' is registered twice: at .*group_relative\.py:\d+ and at .*test_estimators\.py:\d+"
    with pytest.raises(ValueError, match=places):
        estimators.register("grpo")(lambda batch, history: batch.rewards)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_does_not_change_a_bit(implementation: str, name: str) -> None:
    """Advantages and what is remembered, over two steps."""
    estimator = estimators.get(name)
    steps = [random_rows(1), random_rows(2)]
    history = History()
    expected = [estimator(rows, history) for rows in steps]
    for seed in range(3):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(96))
        again = History()
        for rows, advantages in zip(steps, expected, strict=True):
            actual = estimator(shuffled(rows, order), again)
            assert torch.equal(actual.view(torch.int64), advantages[order].view(torch.int64))
        assert again.state_dict() == history.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_float32_rewards_are_read_in_double_precision_and_no_rows_have_no_advantages(name: str) -> None:
    rows = random_rows(3)
    single = as_reward_batch(rows.rewards.float(), rows.group_ids, rows.task_ids, rows.parts)
    double = as_reward_batch(rows.rewards.float().double(), rows.group_ids, rows.task_ids, rows.parts)
    advantages = estimators.get(name)(single, History())
    assert advantages.dtype == torch.float64
    assert torch.equal(advantages, estimators.get(name)(double, History()))
    empty = torch.zeros(0, dtype=torch.int64)
    assert estimators.get(name)(as_reward_batch(empty.double(), empty, empty), History()).shape == (0,)


@pytest.mark.parametrize("name", [*sorted(set(NAMES) - {"dr_grpo", "rloo"}), "reinforce_plus_plus, batch"])
@pytest.mark.parametrize("exponent", [1024, 600, -600])
def test_a_scale_that_cancels_neither_overflows_nor_vanishes(implementation: str, name: str, exponent: int) -> None:
    """Differences of rewards near the largest double overflow, and squares do from 1e154 on. Powers of two are exact:
    the advantages are those of the rewards as they were, within 1e-12 (their moments are rounded elsewhere)."""
    rng, drawn = np.random.default_rng(4), random_rows(4)
    rewards = rng.choice([-1.0, 1.0], 96) * rng.uniform(0.9, 1.0, 96)  # far apart within every group
    rows = as_reward_batch(
        rewards, drawn.group_ids, drawn.task_ids, {"accuracy": rewards, "length": drawn.parts["length"]}
    )  # type: ignore[arg-type]
    options = {"baseline": "batch"} if name.endswith("batch") else {}
    name = name.split(",")[0]
    # The tolerances are absolute, and so is the least standard deviation: they must be small for every scale.
    for option, least in (("tie_tolerance", 0.0), ("min_std", 1e-200)):
        if option in estimators.options(name):
            options[option] = least
    estimator = estimators.bind(name, **options)
    expected, actual = (estimator(scaled(rows, power), History()) for power in (0, exponent))
    np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_denormal_rewards_have_finite_advantages(implementation: str, name: str) -> None:
    """A standard deviation of denormals may round to 0."""
    least = 5e-324
    rewards = np.array([0.0, 0.0, 0.0, least, least, least, 0.0, 2 * least])
    ids = np.repeat([0, 1], 4)
    options = {"tie_tolerance": 0.0} if "tie_tolerance" in estimators.options(name) else {}
    actual = estimators.bind(name, **options)(as_reward_batch(rewards, ids, ids, {"accuracy": rewards}), History())
    assert actual.isfinite().all()


def test_rows_take_components_by_ascending_name_in_double_precision() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    parts = {"format": torch.tensor([1.0, 0.0]), "accuracy": np.array([0.25, 1.0])}
    rows = as_reward_batch(torch.zeros(2), ids, ids, parts)  # type: ignore[arg-type]
    assert list(rows.parts) == ["accuracy", "format"]
    assert [part.dtype for part in rows.parts.values()] == [torch.float64] * 2
    assert rows.parts["accuracy"].tolist() == [0.25, 1.0]
    assert as_reward_batch(torch.zeros(2), ids, ids).parts == {}
    with pytest.raises(ValueError, match="part 'format' needs one entry a rollout, got length 1 for 2"):
        as_reward_batch(torch.zeros(2), ids, ids, {"format": torch.zeros(1)})
    with pytest.raises(TypeError, match=r"part 'format' has dtype torch\.int64; expected float32, float64"):
        as_reward_batch(torch.zeros(2), ids, ids, {"format": ids})


def test_a_history_survives_json_bit_for_bit() -> None:
    history, loaded = History(), History()
    history.moments = {LIMITS.max: Moments(0.1, 1 / 3), -3: Moments(5e-324, 1.7e308)}
    loaded.moments = {8: Moments(0.0, 1.0)}
    loaded.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert loaded.moments == history.moments


@pytest.mark.parametrize(
    "state", [{}, {"moments": {}, "steps": 1}, {"moments": {"a": [0, 1]}}, {"moments": {"1": [0]}}]
)
def test_a_state_that_is_no_history_is_an_error_and_changes_nothing(state: dict) -> None:
    history = History()
    history.moments = {8: Moments(0.0, 1.0)}
    with pytest.raises(ValueError, match="not a state of an estimator's history"):
        history.load_state_dict(state)
    assert history.moments == {8: Moments(0.0, 1.0)}
