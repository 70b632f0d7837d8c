# SPDX-License-Identifier: Apache-2.0
"""The interface of an advantage estimator, and how an estimator is found by its name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_g2rpo import registry
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch

Estimator = Callable[[RewardBatch, History], Tensor]

register = registry.estimators.register
get = registry.estimators.get
names = registry.estimators.names
options = registry.estimators.options
bind = registry.estimators.bind


def uses_parts(name: str) -> bool:
    """Return whether an estimator reads the parts of the rewards and their weights.

    Raises:
        ValueError: the name is unknown.
    """
    return bool(registry.estimators.entry(name).facts.get("uses_parts", False))
