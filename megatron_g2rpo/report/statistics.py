# SPDX-License-Identifier: Apache-2.0
"""Statistics of recorded rollouts: confidence bands of mean rewards, spreads of lengths, quantiles of advantages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from megatron_g2rpo.report.rollouts import Overview

# Probabilities at which a quantile plot has its points: the tails of N(0, 1) beyond 2.3 are a few rollouts a run.
PROBABILITIES = np.linspace(0.01, 0.99, 50)
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve with its lower and upper bounds, ``[S]`` each, of the steps that it has a value of."""

    steps: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def reward_band(overview: Overview, task: str | None) -> Band | None:
    """The mean reward of each step with its 95 % confidence interval; None where no step has two groups.

    Answers to one prompt are alike, so the interval is that of the mean of the groups' means (a cluster-robust standard
    error): ``mean +- z s / sqrt(G)`` of G groups, ``s`` the standard deviation between them.

    Args:
        overview: the rollouts.
        task: the task; None: all.
    """
    known = np.isfinite(overview.reward) & (True if task is None else overview.task == task)
    if not known.any():
        return None
    step, group, reward = overview.step[known], overview.group_id[known], overview.reward[known]
    _, place = np.unique(np.stack([step, group]), axis=1, return_inverse=True)
    counts = np.bincount(place)
    means = np.bincount(place, reward) / counts
    of_step = np.zeros(len(counts), dtype=step.dtype)
    of_step[place] = step
    steps, at = np.unique(of_step, return_inverse=True)
    groups = np.bincount(at)
    middle = np.bincount(at, means) / groups
    squares = np.bincount(at, (means - middle[at]) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * np.sqrt(squares / (groups - 1) / groups)
    enough = groups > 1
    if not enough.any():
        return None
    return Band(steps=steps[enough], low=(middle - error)[enough], middle=middle[enough], high=(middle + error)[enough])


def length_band(overview: Overview, task: str) -> Band | None:
    """The median response length of each step, in tokens, between its 10th and 90th percentile."""
    mine = overview.task == task
    if not mine.any():
        return None
    order = np.argsort(overview.step[mine], kind="stable")
    step, tokens = overview.step[mine][order], overview.tokens[mine][order]
    steps, starts = np.unique(step, return_index=True)
    spreads = np.array([np.quantile(part, (0.1, 0.5, 0.9)) for part in np.split(tokens, starts[1:])])
    return Band(steps=steps, low=spreads[:, 0], middle=spreads[:, 1], high=spreads[:, 2])


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Quantiles of a task's advantages beside those of N(0, 1).

    Attributes:
        first, last: the steps that they are of.
        count: number of advantages.
        normal: quantiles of N(0, 1), ``[Q]``.
        found: quantiles of the advantages, ``[Q]``.
    """

    first: int
    last: int
    count: int
    normal: np.ndarray
    found: np.ndarray


def advantage_quantiles(overview: Overview, task: str, parts: int = 3) -> list[Quantiles]:
    """The quantiles of a task's advantages in equal parts of the run, first to last.

    Groups without signal (all of whose advantages are 0) are left out: they are no part of the distribution that the
    estimator shapes.
    """
    mine = np.flatnonzero((overview.task == task) & np.isfinite(overview.advantage))
    if not len(mine):
        return []
    step, advantage = overview.step[mine], overview.advantage[mine]
    _, place = np.unique(np.stack([step, overview.group_id[mine]]), axis=1, return_inverse=True)
    signal = (np.bincount(place, np.abs(advantage)) > 0)[place]
    step, advantage = step[signal], advantage[signal]
    if not len(step):
        return []
    edges = np.linspace(step.min(), step.max() + 1, parts + 1)
    normal = np.array([NormalDist().inv_cdf(float(p)) for p in PROBABILITIES])
    found = []
    for start, end in pairwise(edges.tolist()):
        here = (step >= start) & (step < end)
        if here.sum() >= 2:
            found.append(
                Quantiles(
                    first=int(step[here].min()),
                    last=int(step[here].max()),
                    count=int(here.sum()),
                    normal=normal,
                    found=np.quantile(advantage[here], PROBABILITIES),
                )
            )
    return found


def changes_since_last_time(overview: Overview) -> np.ndarray:
    """How each rollout's reward differs from its prompt's mean reward when the prompt was last drawn, float64 ``[N]``.

    NaN where the prompt was not drawn before, or one of the two has no reward.
    """
    change = np.full(len(overview), np.nan)
    before: dict[str, float] = {}
    for rows in overview.groups():
        key = f"{overview.task[rows[0]]}\n{overview.prompt_key[rows[0]]}"
        change[rows] = overview.reward[rows] - before.get(key, np.nan)
        known = overview.reward[rows][np.isfinite(overview.reward[rows])]
        if len(known):
            before[key] = float(known.mean())
    return change
