# SPDX-License-Identifier: Apache-2.0
"""A user's own answer format, reward part and advantage estimator, in one file outside of the package.

The recipe beside it names this file under ``imports`` and each of the three where it is used. Nothing else is needed:

    megatron-g2rpo train examples/plugin/recipe.yaml
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from megatron_g2rpo.extend import answer_format, estimator, reward_part
from megatron_g2rpo.objective import History, RewardBatch, group_statistics
from megatron_g2rpo.tasks.answers.numbers import parse_number
from megatron_g2rpo.types import Response, Sample


@answer_format("within_ten_percent")
def within_ten_percent(answer: str, sample: Sample) -> float:
    """1 if the answer is a number at most 10 % away from the reference, else 0."""
    reference, number = parse_number(sample.answer), parse_number(answer)
    if reference is None:
        raise ValueError(f"the reference answer {sample.answer!r} is not a number")
    return float(number is not None and abs(number - reference) <= 0.1 * abs(reference))


@reward_part("no_repetition")
def no_repetition(sample: Sample, response: Response) -> float:
    """Share of the thinking's words that are not repeated; 0 without thinking."""
    words = (response.thinking or "").split()
    return len(set(words)) / len(words) if words else 0.0


@estimator("clipped_differences", min_group_size=2)
def clipped_differences(batch: RewardBatch, history: History, *, limit: Annotated[float, Gt(0.0)] = 1.0) -> Tensor:
    """Rewards less their group's mean, in units of their task's standard deviation, at most ``limit`` either way.

    Args:
        batch: the rollouts of all ranks.
        history: not needed here; what an estimator remembers from step to step.
        limit: largest size of an advantage.
    """
    statistics = group_statistics(batch.rewards, batch.group_ids, batch.task_ids)
    groups, tasks = statistics.groups, statistics.tasks
    mean = groups.mean[torch.searchsorted(groups.id, batch.group_ids)]
    std = tasks.std[torch.searchsorted(tasks.id, batch.task_ids)].clamp(min=1e-3)
    return ((batch.rewards.double() - mean) / std).clamp(-limit, limit)
