# SPDX-License-Identifier: Apache-2.0
"""The surrogate CISPO, which bounds the weight of each token and learns from every token."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.surrogates.base import (
    RATIO_CLIP_MAX,
    RATIO_CLIP_MIN,
    PolicyLoss,
    check_clamp,
    check_clips,
    check_shapes,
    register,
)


@register("cispo")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    ratio_clip_min: Annotated[float, Ge(0.0), Le(1.0)] = RATIO_CLIP_MIN,
    ratio_clip_max: Annotated[float, Gt(0.0)] = RATIO_CLIP_MAX,
    log_ratio_clamp: Annotated[float, Gt(0.0)],
) -> PolicyLoss:
    """Return a policy-gradient loss with a clipped importance weight: ``-clip(r, 1 - low, 1 + high) A logprob``.

    Low and high are ``ratio_clip_min`` and ``ratio_clip_max``.

    The weight carries no gradient, so a clipped token still has one, unlike in ``ppo``. The value of the loss says
    nothing about progress; its gradient is the object. ``clipped_low`` and ``clipped_high`` hold for either sign of A,
    and not where A is 0.

    Source: CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5. The upper bound is the one that matters there;
    ``ratio_clip_min = 1`` leaves out the lower one.

    Args:
        ratio_clip_min: distance of the lower bound from 1, in [0, 1].
        ratio_clip_max: distance of the upper bound from 1, at least 0.
        log_ratio_clamp: bound on the log-ratio in the weight alone; a token beyond it still has a gradient.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    check_clips(ratio_clip_min, ratio_clip_max)
    check_clamp(log_ratio_clamp)
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs).detach().clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    counts = advantages != 0
    return PolicyLoss(
        loss=-ratio.clamp(1.0 - ratio_clip_min, 1.0 + ratio_clip_max) * advantages * logprobs,
        ratio=ratio,
        clipped_low=counts & (ratio < 1.0 - ratio_clip_min),
        clipped_high=counts & (ratio > 1.0 + ratio_clip_max),
        clipped_dual=counts.new_zeros(counts.shape),
    )
