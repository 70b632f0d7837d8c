# SPDX-License-Identifier: Apache-2.0
"""The mathematics of G2RPO: tensors in, tensors out. No Megatron, no files, no tokenizer.

``advantages`` and ``estimators`` turn rewards into advantages (``sharded`` does so over ranks); ``surrogates`` turns
advantages into per-token losses; ``entropy`` keeps the entropy of every task between its bounds.
"""

from megatron_g2rpo.objective import entropy, estimators, surrogates
from megatron_g2rpo.objective.advantages import (
    GroupStatistics,
    SetStatistics,
    backend,
    gaussian_advantages,
    group_statistics,
)
from megatron_g2rpo.objective.estimators import Estimator
from megatron_g2rpo.objective.sharded import sharded_advantages
from megatron_g2rpo.objective.surrogates import PolicyLoss

__all__ = [
    "Estimator",
    "GroupStatistics",
    "PolicyLoss",
    "SetStatistics",
    "backend",
    "entropy",
    "estimators",
    "gaussian_advantages",
    "group_statistics",
    "sharded_advantages",
    "surrogates",
]
