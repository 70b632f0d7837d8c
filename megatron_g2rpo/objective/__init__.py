# SPDX-License-Identifier: Apache-2.0
"""The mathematics of G2RPO: functions of tensors, without Megatron, files or tokenizers.

``advantages`` and ``estimators`` turn rewards into advantages (``sharded`` does so over ranks, ``diagnostics`` says how
they are distributed); ``surrogates`` turns advantages into per-token losses; ``kl`` holds the policy near a reference;
``importance`` corrects for what the rollout engine sampled from; ``entropy`` keeps the entropy of every task between
its bounds.
"""

from megatron_g2rpo.objective import entropy, estimators, importance, kl, surrogates
from megatron_g2rpo.objective.advantages import (
    GroupStatistics,
    SetStatistics,
    backend,
    gaussian_advantages,
    group_statistics,
)
from megatron_g2rpo.objective.diagnostics import AdvantageDiagnostics, advantage_diagnostics
from megatron_g2rpo.objective.estimators import Estimator
from megatron_g2rpo.objective.history import History
from megatron_g2rpo.objective.reward_batch import RewardBatch
from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.sharded import ShardedAdvantages, sharded_advantages, sharded_statistics
from megatron_g2rpo.objective.surrogates import PolicyLoss

__all__ = [
    "AdvantageDiagnostics",
    "Estimator",
    "GroupStatistics",
    "History",
    "PolicyLoss",
    "RewardBatch",
    "Sequences",
    "SetStatistics",
    "ShardedAdvantages",
    "advantage_diagnostics",
    "backend",
    "entropy",
    "estimators",
    "gaussian_advantages",
    "group_statistics",
    "importance",
    "kl",
    "sharded_advantages",
    "sharded_statistics",
    "surrogates",
]
