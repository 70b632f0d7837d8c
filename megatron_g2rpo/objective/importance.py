# SPDX-License-Identifier: Apache-2.0
"""The training-inference gap between the log-probabilities of rollout engine and trainer: weights, masks and sums.

The engine samples from its own distribution, which differs from the trainer's at the same weights (other kernels, other
precision), so that the loss is off-policy from its first update. The trainer's log-probabilities at the weights that
sampled are the ``old_logprobs`` of the surrogates.

Shape letters: ``S`` tokens of (a share of) a packed row, ``T`` tasks, numbered 0..T-1. Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.objective import kl
from megatron_g2rpo.objective.sequences import Sequences

# One token that the trainer thinks impossible must not drown a task's mean: exp(20) is 5e8.
_LOG_RATIO_CLAMP = 20.0


def truncated_weights(old_logprobs: Tensor, behaviour_logprobs: Tensor, *, cap: float) -> Tensor:
    """Return the importance weight of each token, from the engine's distribution to the trainer's, cut at ``cap``.

    The token's loss is multiplied by it. Source: truncated importance sampling, F. Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025.

    Args:
        old_logprobs: ``[S]``, the trainer's log-probabilities.
        behaviour_logprobs: ``[S]``, the engine's log-probabilities.
        cap: largest weight, at least 1, which is the weight of a token on which both agree.

    Returns:
        The weights ``[S]``: ``min(exp(old - behaviour), cap)``.

    Raises:
        ValueError: shapes differ, or ``cap`` is out of its range.
    """
    if not 1.0 <= cap < math.inf:
        raise ValueError(f"cap must be at least 1 and finite, got {cap}")
    return _gap(old_logprobs, behaviour_logprobs).exp().clamp(max=cap)


def sequences_within(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, sequences: Sequences, *, low: float, high: float
) -> Tensor:
    """Return which tokens belong to a sequence on which engine and trainer agree.

    They agree where the geometric mean of the sequence's token ratios, ``exp(mean(old - behaviour))``, lies in
    ``[low, high]``.

    Args:
        old_logprobs: ``[S]``, the trainer's log-probabilities.
        behaviour_logprobs: ``[S]``, the engine's log-probabilities.
        sequences: which sequence each token belongs to; its ``reduce`` is called once.
        low: lower bound, in [0, 1].
        high: upper bound, at least 1.

    Returns:
        bool ``[S]``; False where a token belongs to no sequence.

    Raises:
        ValueError: shapes differ, or a bound is out of its range.
    """
    if not 0.0 <= low <= 1.0:
        raise ValueError(f"low must lie in [0, 1], got {low}")
    if not high >= 1.0:
        raise ValueError(f"high must be at least 1, got {high}")
    ratio = sequences.mean(_gap(old_logprobs, behaviour_logprobs)).exp()
    return (sequences.ids >= 0) & (ratio >= low) & (ratio <= high)


@dataclass(frozen=True, kw_only=True)
class GapSums:
    """Sums over the tokens of each task, float64 ``[T]`` each.

    Ranks combine them by an all-reduce: by sum, and ``largest`` by maximum.

    Attributes:
        count: number of tokens.
        absolute: sum of ``|old - behaviour|``, nats.
        kl: sum of k3 estimates of KL(behaviour || old), nats; the tokens are samples of the rollout engine. Only here,
            a token's log-ratio is cut to plus or minus 20.
        largest: maximum of ``|old - behaviour|``, nats; 0 without tokens.
    """

    count: Tensor
    absolute: Tensor
    kl: Tensor
    largest: Tensor

    def merge(self, other: GapSums) -> GapSums:
        """Return the sums over the tokens of both, for several micro-batches."""
        return GapSums(
            count=self.count + other.count,
            absolute=self.absolute + other.absolute,
            kl=self.kl + other.kl,
            largest=torch.maximum(self.largest, other.largest),
        )


def gap_sums(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, task_ids: Tensor, mask: Tensor, num_tasks: int
) -> GapSums:
    """Sum the gap by task over the tokens of one micro-batch.

    Args:
        old_logprobs: ``[S]``, the trainer's log-probabilities.
        behaviour_logprobs: ``[S]``, the engine's log-probabilities.
        task_ids: int64 ``[S]``, task of each token; may be -1 where ``mask`` is 0.
        mask: ``[S]``, not 0 at response tokens.
        num_tasks: number of tasks, T.

    Raises:
        ValueError: shapes differ.
    """
    _check_shapes(old_logprobs=old_logprobs, behaviour_logprobs=behaviour_logprobs, task_ids=task_ids, mask=mask)
    kept = mask != 0
    tasks = task_ids[kept]
    old, behaviour = (logprobs.detach()[kept].double() for logprobs in (old_logprobs, behaviour_logprobs))
    gap = (old - behaviour).abs()
    zeros = torch.zeros(num_tasks, dtype=torch.float64, device=mask.device)
    return GapSums(
        count=zeros.index_add(0, tasks, torch.ones_like(gap)),
        absolute=zeros.index_add(0, tasks, gap),
        kl=zeros.index_add(0, tasks, kl.penalty("k3", behaviour, old, log_ratio_clamp=_LOG_RATIO_CLAMP)),
        largest=zeros.scatter_reduce(0, tasks, gap, "amax"),
    )


def _gap(old_logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Return the log-ratio of the trainer's to the engine's probability: ``[S]``, without gradient."""
    _check_shapes(old_logprobs=old_logprobs, behaviour_logprobs=behaviour_logprobs)
    return (old_logprobs - behaviour_logprobs).detach()


def _check_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"one shape [S] is needed, got {shapes}")
