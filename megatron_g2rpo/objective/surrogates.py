# SPDX-License-Identifier: Apache-2.0
"""Policy surrogates, by the name a recipe gives them: per-token losses, to be averaged by the caller.

Shape letter: ``S`` tokens of (a share of) a packed row. A surrogate is called as ``(logprobs, behaviour_logprobs,
advantages, sequences, **options)``. Positions outside the loss mask are computed like the others and must be masked
when summing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo.objective.registry import Registry
from megatron_g2rpo.objective.sequences import Sequences

_registry: Registry = Registry("surrogate")
register = _registry.register
get = _registry.get
names = _registry.names
options = _registry.options
bind = _registry.bind


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Per-token loss and what the clips did. All but ``loss`` carry no gradient.

    Attributes:
        loss: ``[S]``, to be minimised.
        ratio: ``[S]``, probability of the token under the policy over that under the behaviour policy.
        clipped_low: bool ``[S]``, the lower clip decides the loss (negative advantage, ratio below its bound).
        clipped_high: bool ``[S]``, the upper clip decides the loss (positive advantage, ratio above its bound).
        clipped_dual: bool ``[S]``, the dual clip decides the loss (negative advantage, ratio above its bound).
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor

    def sums(self, mask: Tensor) -> dict[str, Tensor]:
        """Sums of the diagnostics over the tokens where ``mask`` ``[S]`` is not 0.

        Sums, not means: they add up over micro-batches and ranks, and are divided by the global token count once.
        """
        kept = mask != 0
        names = ("ratio", "clipped_low", "clipped_high", "clipped_dual")
        return {name: torch.where(kept, getattr(self, name), 0.0).sum() for name in names}


@register("ppo")
def ppo(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
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
        logprobs: ``[S]``, log-probabilities of the sampled tokens under the policy, with gradient.
        behaviour_logprobs: ``[S]``, under the policy that is kept fixed for the step; used without gradient.
        advantages: ``[S]``, used without gradient.
        sequences: not used, a token's loss depends on that token alone.
        clip_low: distance of the lower bound from 1, in [0, 1].
        clip_high: distance of the upper bound from 1, at least 0.
        dual_clip: bound on the ratio where A < 0, above 1; None for none.
        log_ratio_clamp: log-ratios are cut to plus or minus this before the exponential, so that a token can't
            overflow the loss; beyond it the gradient is 0.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    _check_ppo_options(clip_low, clip_high, dual_clip, log_ratio_clamp)
    _check_shapes(logprobs, behaviour_logprobs, advantages, sequences)
    advantages = advantages.detach()
    log_ratio = logprobs - behaviour_logprobs.detach()
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


def _check_shapes(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, sequences: Sequences) -> None:
    shapes = [tuple(tensor.shape) for tensor in (logprobs, behaviour_logprobs, advantages, sequences.ids)]
    if len(set(shapes)) > 1:
        raise ValueError(
            "logprobs, behaviour_logprobs, advantages and sequences.ids must have one shape [S], got "
            + ", ".join(map(str, shapes))
        )


def _check_ppo_options(clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low must lie in [0, 1], got {clip_low}")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high must not be negative, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1 (or None for no dual clip), got {dual_clip}")
    if not log_ratio_clamp > 0.0:
        raise ValueError(f"log_ratio_clamp must be above 0, got {log_ratio_clamp}")
