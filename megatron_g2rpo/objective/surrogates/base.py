# SPDX-License-Identifier: Apache-2.0
"""The registry of surrogates, their result, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rpo import registry
from megatron_g2rpo.objective.sequences import Sequences

register = registry.surrogates.register
get = registry.surrogates.get
names = registry.surrogates.names
options = registry.surrogates.options
bind = registry.surrogates.bind

# Defaults of OpenVLThinkerV2's public code: clip-higher, dual clip.
RATIO_CLIP_MIN, RATIO_CLIP_MAX, RATIO_CLIP_C = 0.2, 0.3, 3.0


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of each token, and which clips decided it. Only ``loss`` carries gradient.

    Attributes:
        loss: ``[S]``, the loss to be minimised.
        ratio: ``[S]``, probability of the token (``gspo``: of its sequence, per token) under the policy divided by that
            under the old policy.
        clipped_low: bool ``[S]``, the lower clip decides the loss.
        clipped_high: bool ``[S]``, the upper clip decides the loss.
        clipped_dual: bool ``[S]``, the dual clip decides the loss.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor

    def sums(self, mask: Tensor) -> dict[str, Tensor]:
        """Return sums of the diagnostics over the tokens where ``mask [S]`` is not 0.

        They are sums, not means, because sums add up over micro-batches and ranks; they are divided by the global
        token count once.
        """
        kept = mask != 0
        names = ("ratio", "clipped_low", "clipped_high", "clipped_dual")
        return {name: torch.where(kept, getattr(self, name), 0.0).sum() for name in names}


def check_shapes(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Sequences) -> None:
    """Check that tensors have equal shapes, so that none broadcasts.

    Raises:
        ValueError: shapes differ.
    """
    shapes = [tuple(tensor.shape) for tensor in (logprobs, old_logprobs, advantages, sequences.ids)]
    if len(set(shapes)) > 1:
        raise ValueError(
            "logprobs, old_logprobs, advantages and sequences.ids must have one shape [S], got "
            + ", ".join(map(str, shapes))
        )


def check_clips(ratio_clip_min: float, ratio_clip_max: float) -> None:
    """Check that the clips' bounds leave some ratios around 1 unclipped.

    Raises:
        ValueError: a distance of a bound from 1 is out of range.
    """
    if not 0.0 <= ratio_clip_min <= 1.0:
        raise ValueError(f"ratio_clip_min must lie in [0, 1], got {ratio_clip_min}")
    if not ratio_clip_max >= 0.0:
        raise ValueError(f"ratio_clip_max must not be negative, got {ratio_clip_max}")


def check_clamp(log_ratio_clamp: float) -> None:
    """Check that the clamp does not cut every log-ratio.

    Raises:
        ValueError: the clamp is out of range.
    """
    if not log_ratio_clamp > 0.0:
        raise ValueError(f"log_ratio_clamp must be above 0, got {log_ratio_clamp}")
