# SPDX-License-Identifier: Apache-2.0
"""Ten million rollouts: 312,500 groups of 32 in six tasks, through both stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from megatron_g2rpo.objective import advantages, gaussian_advantages, group_statistics

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(advantages.backend() != "cpp", reason="the compiled op is not built here"),
]

GROUPS, SIZE, TASKS = 312_500, 32, 6


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def image(values: np.ndarray) -> np.ndarray:
    """One stage over one set, by ranks: values equal to 9 digits share the mean of the quantiles of their ranks."""
    _, chain, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
    quantiles = ndtri((np.arange(len(values)) + 0.5) / len(values))
    return (np.add.reduceat(quantiles, np.cumsum(counts) - counts) / counts)[chain]


def test_ten_million_rollouts() -> None:
    """Spot checks within 1e-8: the statement rounds to 9 digits between the stages, and sums 10^5 terms naively."""
    rng = np.random.default_rng(0)
    n = GROUPS * SIZE
    groups = np.repeat(rng.permutation(GROUPS), SIZE)
    tasks = np.repeat(rng.integers(0, TASKS, GROUPS), SIZE)
    rewards = rng.random(n)
    rewards[: n // 2] = np.round(rewards[: n // 2] * 4) / 4  # half of the groups are full of ties
    rewards[: 8 * SIZE] = 0.5  # and some carry no signal

    Path("/proc/self/clear_refs").write_text("5")  # the most starts again from now
    before = resident("VmRSS")
    result = gaussian_advantages(rewards, groups, tasks).numpy()
    statistics = group_statistics(rewards, groups, tasks)
    # Measured: 39 bytes a rollout, 8 of them the result.
    assert resident("VmHWM") - before < 64 * n
    assert result.shape == (n,)
    assert np.isfinite(result).all()
    assert (result[: 8 * SIZE] == 0.0).all()
    assert int(statistics.groups.count.sum()) == n
    assert len(statistics.tasks.id) == TASKS

    by_group = gaussian_advantages(rewards, groups, tasks, stages=["group"]).numpy().reshape(GROUPS, SIZE)
    for group in [*range(8, 12), *rng.integers(8, GROUPS, 50)]:
        expected = image(rewards.reshape(GROUPS, SIZE)[group])
        np.testing.assert_allclose(by_group[group], expected, atol=1e-12, rtol=0)
    members = np.flatnonzero((tasks == 3) & np.repeat(np.ptp(rewards.reshape(GROUPS, SIZE), axis=1) > 0, SIZE))
    np.testing.assert_allclose(result[members], image(by_group.ravel()[members]), atol=1e-8, rtol=0)

    order = rng.permutation(n)
    shuffled = gaussian_advantages(rewards[order], groups[order], tasks[order])
    assert torch.equal(shuffled.view(torch.int64), torch.from_numpy(result[order]).view(torch.int64))
