# SPDX-License-Identifier: Apache-2.0
"""Surrogates that stop learning from a ratio beyond its bounds: ``ppo`` by token, ``gspo`` by sequence."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.surrogates.base import (
    RATIO_CLIP_C,
    RATIO_CLIP_MAX,
    RATIO_CLIP_MIN,
    PolicyLoss,
    check_clamp,
    check_clips,
    check_shapes,
    register,
)


@register("ppo")
def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    ratio_clip_min: Annotated[float, Ge(0.0), Le(1.0)] = RATIO_CLIP_MIN,
    ratio_clip_max: Annotated[float, Gt(0.0)] = RATIO_CLIP_MAX,
    ratio_clip_c: Annotated[float, Gt(1.0)] | None = RATIO_CLIP_C,
    log_ratio_clamp: Annotated[float, Gt(0.0)],
) -> PolicyLoss:
    """Return the clipped surrogate of PPO, with separate bounds, and a dual clip for negative advantages.

    With r the ratio and A the advantage of a token, the loss is ``max(-A r, -A clip(r, 1 - low, 1 + high))``, where
    A < 0 at most ``-A c``; low, high and c are ``ratio_clip_min``, ``ratio_clip_max`` and ``ratio_clip_c``.

    Sources: PPO, arXiv 1707.06347, equation 7; separate bounds, DAPO, arXiv 2503.14476, equation 10; dual clip, arXiv
    1912.09729, equation 5.

    Args:
        ratio_clip_min: distance of the lower bound from 1, in [0, 1].
        ratio_clip_max: distance of the upper bound from 1, at least 0.
        ratio_clip_c: bound on the ratio where A < 0, above 1; None for no dual clip.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    return _clipped(
        logprobs - old_logprobs.detach(), advantages, ratio_clip_min, ratio_clip_max, ratio_clip_c, log_ratio_clamp
    )


@register("gspo")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    ratio_clip_min: Annotated[float, Ge(0.0), Le(1.0)] = RATIO_CLIP_MIN,
    ratio_clip_max: Annotated[float, Gt(0.0)] = RATIO_CLIP_MAX,
    ratio_clip_c: Annotated[float, Gt(1.0)] | None = RATIO_CLIP_C,
    log_ratio_clamp: Annotated[float, Gt(0.0)],
) -> PolicyLoss:
    """Return the loss of ``ppo`` with the ratio of the whole sequence, ``s = exp(mean of its tokens' log-ratios)``.

    The value of s is shared by the sequence's tokens, while each token's gradient is that of its own log-probability.
    Where A is constant in a sequence, the mean of the loss over its tokens thus has the value and the gradient of
    ``max(-A s, -A clip(s))`` with s differentiated through all of its tokens; and no gradient has to cross ranks that
    share a sequence. Average per sequence to give every sequence the same weight, as the paper does.

    s is a geometric mean, hence much closer to 1 than a token's ratio, and wants much narrower bounds than ``ppo``.

    Source: GSPO, arXiv 2507.18071, equation 7 (s) and, in the form used here, 14 (GSPO-token). The dual clip is
    that of ``ppo``.

    Args:
        sequences: which sequence each token belongs to; a token of none has s = 1. Its ``reduce`` is called once.
        ratio_clip_min: distance of the lower bound from 1, in [0, 1].
        ratio_clip_max: distance of the upper bound from 1, at least 0.
        ratio_clip_c: bound on the ratio where A < 0, above 1; None for no dual clip.
        log_ratio_clamp: bound on the mean log-ratio of a sequence, not on those of tokens.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    log_ratio = sequences.mean(logprobs - old_logprobs) + (logprobs - logprobs.detach())
    return _clipped(log_ratio, advantages, ratio_clip_min, ratio_clip_max, ratio_clip_c, log_ratio_clamp)


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    ratio_clip_min: float,
    ratio_clip_max: float,
    ratio_clip_c: float | None,
    log_ratio_clamp: float,
) -> PolicyLoss:
    check_clips(ratio_clip_min, ratio_clip_max)
    check_clamp(log_ratio_clamp)
    if ratio_clip_c is not None and not ratio_clip_c > 1.0:
        raise ValueError(f"ratio_clip_c must be above 1 (or None for no dual clip), got {ratio_clip_c}")
    advantages = advantages.detach()
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - ratio_clip_min, 1.0 + ratio_clip_max))

    ratio = ratio.detach()
    negative = advantages < 0
    clipped_dual = torch.zeros_like(negative)
    if ratio_clip_c is not None:
        clipped_dual = negative & (ratio > ratio_clip_c)
        loss = torch.where(clipped_dual, -advantages * ratio_clip_c, loss)
    return PolicyLoss(
        loss=loss,
        ratio=ratio,
        clipped_low=negative & (ratio < 1.0 - ratio_clip_min),
        clipped_high=(advantages > 0) & (ratio > 1.0 + ratio_clip_max),
        clipped_dual=clipped_dual,
    )
