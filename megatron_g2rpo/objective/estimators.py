# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, by the name a recipe gives them.

An estimator maps the whole global batch, (rewards, groups, tasks) of ``[N]`` each, to float64 advantages ``[N]``. It
must not depend on the order of the rows: ``sharded_advantages`` relies on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_g2rpo.objective.advantages import TIE_TOLERANCE, gaussian_advantages, group_statistics
from megatron_g2rpo.objective.registry import Registry

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]

_registry: Registry = Registry("advantage estimator")
register = _registry.register
get = _registry.get
names = _registry.names
options = _registry.options
bind = _registry.bind

register("g2rpo")(gaussian_advantages)


@register("grpo")
def grpo(rewards: Tensor, groups: Tensor, tasks: Tensor, *, tie_tolerance: float = TIE_TOLERANCE) -> Tensor:
    """Group-relative advantages, ``(R - mean) / population standard deviation`` within each group.

    Source: "DeepSeekMath", arXiv 2402.03300, equation of section 4.1.2. The population standard deviation, with nothing
    added to the denominator, is what the figure of arXiv 2604.08539 shows.

    Args:
        rewards: float32 or float64 ``[N]``.
        groups: int64 ``[N]``.
        tasks: int64 ``[N]``; only checked.
        tie_tolerance: a group whose rewards are all equal within it gets 0.

    Returns:
        float64 ``[N]``.

    Raises:
        TypeError, ValueError: as ``group_statistics``.
    """
    statistics = group_statistics(rewards, groups, tasks, tie_tolerance=tie_tolerance).groups
    index = torch.searchsorted(statistics.id, torch.as_tensor(groups).long())
    deviation = torch.as_tensor(rewards).double() - statistics.mean[index]
    zero = statistics.zero_variance[index]
    return torch.where(zero, 0.0, deviation / torch.where(zero, 1.0, statistics.std[index]))
