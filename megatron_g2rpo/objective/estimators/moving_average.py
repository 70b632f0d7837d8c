# SPDX-License-Identifier: Apache-2.0
"""The estimator that divides by moving averages of a task's moments, which a ``History`` keeps from step to step."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from megatron_g2rpo.objective.advantages import group_statistics
from megatron_g2rpo.objective.estimators.base import register
from megatron_g2rpo.objective.estimators.moments import scaled_difference
from megatron_g2rpo.objective.history import History, Moments
from megatron_g2rpo.objective.reward_batch import RewardBatch


@register("ema_grpo", min_group_size=2)
def ema_grpo(
    batch: RewardBatch,
    history: History,
    *,
    ema_decay: Annotated[float, Ge(0.0), Lt(1.0)] = 0.99,
    min_std: Annotated[float, Gt(0.0)] = 1e-3,
) -> Tensor:
    """Subtract from each reward the mean of its group, and divide by the moving standard deviation of its task.

    Every call is a step: it first moves the averages of the tasks among its rollouts, ``m1 <- d m1 + (1 - d) mean(R)``
    and ``m2 <- d m2 + (1 - d) mean(R^2)`` (a task's first step sets them), and then divides by ``sqrt(m2 - m1^2)``.
    Call it once a step. Tasks that are absent keep their averages.

    Source: "OneThinker: All-in-one Reasoning Model for Image and Video", arXiv 2512.03043 (EMA-GRPO).

    Args:
        history: the estimator's memory, whose ``moments`` are updated in place.
        ema_decay: decay d of the averages, at least 0 and below 1.
        min_std: smallest divisor, above 0.

    Returns:
        The advantages, float64 ``[N]``.

    Raises:
        ValueError: an option is out of its range, or a reward is not finite.
    """
    if not (0.0 <= ema_decay < 1.0 and 0.0 < min_std < math.inf):
        raise ValueError(f"ema_decay must be in [0, 1) and min_std above 0, got {ema_decay} and {min_std}")
    values = batch.rewards.double()
    statistics = group_statistics(values, batch.group_ids, batch.task_ids)
    groups, tasks = statistics.groups, statistics.tasks
    steps = zip(tasks.id.tolist(), tasks.mean.tolist(), tasks.std.tolist(), strict=True)
    for task, mean, std in steps:
        history.moments[task] = moved(history.moments.get(task), Moments(mean, std), ema_decay)
    divisors = [max(history.moments[task].std, min_std) for task in tasks.id.tolist()]
    of_task = torch.tensor(divisors, dtype=torch.float64)[torch.searchsorted(tasks.id, batch.task_ids)]
    return scaled_difference(values, groups.mean[torch.searchsorted(groups.id, batch.group_ids)], of_task)


def moved(average: Moments | None, batch: Moments, decay: float) -> Moments:
    """Move the averages of a first and a second moment one step, in terms of mean and standard deviation.

    With ``m2 = std^2 + mean^2``, averaging m1 and m2 gives the variance ``d std^2 + (1 - d) std_batch^2 +
    d (1 - d) (mean - mean_batch)^2``: a sum of squares, which neither cancels like ``m2 - m1^2`` nor overflows.
    """
    if average is None:
        return batch
    rest = 1.0 - decay
    between = math.sqrt(decay * rest)
    return Moments(
        mean=decay * average.mean + rest * batch.mean,
        std=math.hypot(
            math.sqrt(decay) * average.std,
            math.sqrt(rest) * batch.std,
            between * average.mean - between * batch.mean,
        ),
    )
