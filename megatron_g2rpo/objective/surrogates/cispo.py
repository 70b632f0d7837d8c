# SPDX-License-Identifier: Apache-2.0
"""A surrogate that bounds how much a token weighs, and learns from every token."""

from __future__ import annotations

from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.surrogates.base import PolicyLoss, check_clamp, check_clips, check_shapes, register


@register("cispo")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float,
) -> PolicyLoss:
    """Policy gradient with a clipped importance weight: ``-clip(r, 1 - clip_low, 1 + clip_high) A logprob``.

    The weight carries no gradient, so a clipped token still has one, unlike in ``ppo``. The value of the loss says
    nothing about progress; its gradient is the object. ``clipped_low`` and ``clipped_high`` hold for either sign of A,
    and not where A is 0.

    Source: CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5. The upper bound is the one that matters there;
    ``clip_low = 1`` leaves out the lower one.

    Args:
        clip_low: distance of the lower bound from 1, in [0, 1].
        clip_high: distance of the upper bound from 1, at least 0.
        log_ratio_clamp: of the weight alone: a token beyond it still has a gradient.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    check_clips(clip_low, clip_high)
    check_clamp(log_ratio_clamp)
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs).detach().clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    counts = advantages != 0
    return PolicyLoss(
        loss=-ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs,
        ratio=ratio,
        clipped_low=counts & (ratio < 1.0 - clip_low),
        clipped_high=counts & (ratio > 1.0 + clip_high),
        clipped_dual=counts.new_zeros(counts.shape),
    )
