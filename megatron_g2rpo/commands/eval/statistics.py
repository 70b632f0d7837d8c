# SPDX-License-Identifier: Apache-2.0
"""The statistics of an evaluation: pure functions of arrays.

The unit is the prompt: several responses to one prompt are averaged first, because they are not independent of each
other. Every figure is then a mean over prompts of one value a prompt, so that one bootstrap serves all of them. Prompts
are resampled within their task: how many prompts a task has is a property of the benchmark, not of chance.

Shape letters: ``P`` prompts, ``M`` values of a prompt, ``R`` resamples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Resampled values that are held at once, 8 bytes each.
_HELD_VALUES = 8_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: the mean.
        low, high: bounds of the interval; None where it cannot be estimated, because a task has fewer than two prompts.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Pooled:
    """The estimates of several tasks, and of all tasks together.

    Attributes:
        by_task: task -> the estimate of each of M values.
        over_tasks: the means over tasks, each task with equal weight.
        over_samples: the means over all prompts.
    """

    by_task: Mapping[str, Sequence[Estimate]]
    over_tasks: Sequence[Estimate]
    over_samples: Sequence[Estimate]


@dataclass(frozen=True)
class Paired:
    """Two evaluations of the same prompts.

    Attributes:
        n: number of prompts.
        earlier, later: their means.
        difference: later minus earlier.
        p_value: two-sided, of the hypothesis that which of the two evaluations a value comes from makes no difference.
    """

    n: int
    earlier: float
    later: float
    difference: Estimate
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """``Paired`` by task, of the mean over tasks with equal weights, and of the mean over all prompts."""

    by_task: Mapping[str, Paired]
    over_tasks: Paired
    over_samples: Paired


def pass_at_k(n: int, successes: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k samples succeeds, from n samples.

    ``1 - C(n - c, k) / C(n, k)`` for c successes, equation 1 of Chen et al. 2021 (arXiv:2107.03374).

    Raises:
        ValueError: k is not in 1..n, or the successes are not in 0..n.
    """
    if not 1 <= k <= n or not 0 <= successes <= n:
        raise ValueError(f"pass@{k} of {successes} successes in {n} samples: need 1 <= k <= n, 0 <= successes <= n")
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def pass_ks(n: int) -> list[int]:
    """The k of which pass@k is reported for n samples: the powers of two below n, and n."""
    return [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def estimates(values: Mapping[str, Array], seed: int = 0) -> Pooled:
    """Means and bootstrap intervals, by task and over tasks.

    Percentile intervals of ``RESAMPLES`` bootstrap resamples of the prompts of each task (Efron and Tibshirani 1993,
    chapter 13). The order of the tasks and what other tasks there are do not change a task's interval.

    Args:
        values: task -> float64 ``[P, M]``, one row a prompt; P differs between tasks, M does not.
        seed: seed of the resampling.
    """
    means = {task: np.array([_mean(column) for column in rows.T]) for task, rows in values.items()}
    draws = {task: _resampled_means(rows, task, seed) for task, rows in values.items()}
    sizes = np.array([len(rows) for rows in values.values()], dtype=np.float64)
    equal = np.full(len(sizes), 1.0 / len(sizes))
    return Pooled(
        by_task={task: _with_interval(means[task], draws[task]) for task in values},
        over_tasks=_weighted(list(means.values()), list(draws.values()), equal),
        over_samples=_weighted(list(means.values()), list(draws.values()), sizes / sizes.sum()),
    )


def paired(earlier: Mapping[str, Array], later: Mapping[str, Array], seed: int = 0) -> Comparison:
    """Compare two evaluations of the same prompts.

    The interval is that of ``estimates`` for the differences of the prompts. The p-value is that of a permutation test:
    under the hypothesis, each difference could as well have the other sign. ``scipy.stats.permutation_test`` goes
    through all signs where they are few, else through 9,999 random ones. P-values are not corrected for the number of
    tasks.

    Args:
        earlier, later: task -> float64 ``[P]``, the same prompts in the same order; at least one task.
        seed: seed of the resampling and of the permutations.
    """
    differences = {task: later[task] - earlier[task] for task in later}
    found = estimates({task: values[:, None] for task, values in differences.items()}, seed)
    sizes = {task: len(values) for task, values in differences.items()}
    equal = {task: 1.0 / (len(sizes) * size) for task, size in sizes.items()}
    pooled = dict.fromkeys(sizes, 1.0 / sum(sizes.values()))

    def together(weights: Mapping[str, float], difference: Estimate) -> Paired:
        """One comparison of all tasks; a weight is that of each prompt of its task."""
        return Paired(
            n=sum(sizes.values()),
            earlier=float(sum(weight * earlier[task].sum() for task, weight in weights.items())),
            later=float(sum(weight * later[task].sum() for task, weight in weights.items())),
            difference=difference,
            p_value=_sign_flip_p(np.concatenate([weights[task] * differences[task] for task in weights]), seed),
        )

    return Comparison(
        by_task={
            task: Paired(
                n=sizes[task],
                earlier=_mean(earlier[task]),
                later=_mean(later[task]),
                difference=found.by_task[task][0],
                p_value=_sign_flip_p(differences[task], seed),
            )
            for task in differences
        },
        over_tasks=together(equal, found.over_tasks[0]),
        over_samples=together(pooled, found.over_samples[0]),
    )


def _mean(values: Array) -> float:
    """The mean, rounded once: figures of one evaluation are the same wherever they are shown."""
    return math.fsum(values) / len(values)


def _resampled_means(rows: Array, task: str, seed: int) -> Array | None:
    """Means of bootstrap resamples, ``[M, R]``; None for fewer than two prompts."""
    if len(rows) < 2:
        return None
    result = stats.bootstrap(
        (rows,),
        np.mean,
        axis=0,
        n_resamples=RESAMPLES,
        batch=max(1, _HELD_VALUES // rows.size),
        method="percentile",
        rng=np.random.default_rng([seed, zlib.crc32(task.encode())]),
    )
    return result.bootstrap_distribution


def _with_interval(means: Array, draws: Array | None) -> list[Estimate]:
    if draws is None:
        return [Estimate(float(mean), None, None) for mean in means]
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail], axis=-1)
    return [Estimate(*map(float, each)) for each in zip(means, low, high, strict=True)]


def _weighted(means: Sequence[Array], draws: Sequence[Array | None], weights: Array) -> list[Estimate]:
    mean = np.sum([weight * each for weight, each in zip(weights, means, strict=True)], axis=0)
    drawn = [weight * each for weight, each in zip(weights, draws, strict=True) if each is not None]
    return _with_interval(mean, np.sum(drawn, axis=0) if len(drawn) == len(draws) else None)


def _sign_flip_p(differences: Array, seed: int) -> float:
    if len(differences) < 2 or not differences.any():  # both signs of one difference are equally far from 0
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=9_999,
        batch=max(1, _HELD_VALUES // differences.size),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
