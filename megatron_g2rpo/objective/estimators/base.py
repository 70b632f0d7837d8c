# SPDX-License-Identifier: Apache-2.0
"""The registry of advantage estimators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch
from megatron_g2rpo.registry import Registry

Estimator = Callable[[RewardBatch, History], Tensor]

_registry: Registry = Registry("advantage estimator")
register = _registry.register
get = _registry.get
names = _registry.names
options = _registry.options
bind = _registry.bind


def uses_parts(name: str) -> bool:
    """Whether an estimator reads the components of the rewards, which its option ``part_weights`` then weighs.

    Raises:
        ValueError: unknown name.
    """
    return "part_weights" in options(name)
