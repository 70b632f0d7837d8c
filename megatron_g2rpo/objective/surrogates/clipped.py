# SPDX-License-Identifier: Apache-2.0
"""Surrogates that stop learning from a ratio beyond its bounds: ``ppo`` by token, ``gspo`` by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.surrogates.base import PolicyLoss, check_clamp, check_clips, check_shapes, register


@register("ppo")
def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float,
) -> PolicyLoss:
    """Clipped surrogate with separate bounds, and a dual clip for negative advantages.

    With r the ratio and A the advantage of a token, the loss is ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``;
    where A < 0, it is at most ``-A dual_clip``.

    Sources: PPO, arXiv 1707.06347, equation 7; separate bounds, DAPO, arXiv 2503.14476, equation 10; dual clip, arXiv
    1912.09729, equation 5.

    Args:
        clip_low: distance of the lower bound from 1, in [0, 1].
        clip_high: distance of the upper bound from 1, at least 0.
        dual_clip: bound on the ratio where A < 0, above 1; None for none.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    return _clipped(logprobs - old_logprobs.detach(), advantages, clip_low, clip_high, dual_clip, log_ratio_clamp)


@register("gspo")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float,
) -> PolicyLoss:
    """``ppo`` with the ratio of the whole sequence, ``s = exp(mean over its tokens of the log-ratio)``.

    The value of s is shared by the sequence's tokens, while each token's gradient is that of its own log-probability.
    Where A is constant in a sequence, the mean of the loss over its tokens thus has the value and the gradient of
    ``max(-A s, -A clip(s))`` with s differentiated through all of its tokens; and no gradient has to cross ranks that
    share a sequence. Average per sequence to give every sequence the same weight, as the paper does.

    s is a geometric mean, hence much closer to 1 than a token's ratio, and wants much narrower bounds than ``ppo``.

    Source: GSPO, arXiv 2507.18071, equation 7 (s) and, in the form used here, 14 (GSPO-token). The dual clip is
    that of ``ppo``.

    Args:
        sequences: a token of none has s = 1. ``reduce`` is called once.
        clip_low: distance of the lower bound from 1, in [0, 1].
        clip_high: distance of the upper bound from 1, at least 0.
        dual_clip: bound on the ratio where A < 0, above 1; None for none.
        log_ratio_clamp: of the mean, not of the tokens.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    log_ratio = sequences.mean(logprobs - old_logprobs) + (logprobs - logprobs.detach())
    return _clipped(log_ratio, advantages, clip_low, clip_high, dual_clip, log_ratio_clamp)


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float,
) -> PolicyLoss:
    check_clips(clip_low, clip_high)
    check_clamp(log_ratio_clamp)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1 (or None for no dual clip), got {dual_clip}")
    advantages = advantages.detach()
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))

    ratio = ratio.detach()
    negative = advantages < 0
    clipped_dual = torch.zeros_like(negative)
    if dual_clip is not None:
        clipped_dual = negative & (ratio > dual_clip)
        loss = torch.where(clipped_dual, -advantages * dual_clip, loss)
    return PolicyLoss(
        loss=loss,
        ratio=ratio,
        clipped_low=negative & (ratio < 1.0 - clip_low),
        clipped_high=(advantages > 0) & (ratio > 1.0 + clip_high),
        clipped_dual=clipped_dual,
    )
