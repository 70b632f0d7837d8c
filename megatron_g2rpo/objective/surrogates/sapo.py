# SPDX-License-Identifier: Apache-2.0
"""The surrogate SAPO, which has a smooth gate instead of a clip."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from megatron_g2rpo.objective.sequences import Sequences
from megatron_g2rpo.objective.surrogates.base import PolicyLoss, check_clamp, check_shapes, register


@register("sapo")
def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    sapo_tau_positive: Annotated[float, Gt(0.0)] = 1.0,
    sapo_tau_negative: Annotated[float, Gt(0.0)] = 1.05,
    log_ratio_clamp: Annotated[float, Gt(0.0)],
) -> PolicyLoss:
    """Return the loss with a soft gate on the ratio: ``-A f(r)`` with ``f(r) = sigmoid(tau (r - 1)) 4 / tau``.

    f has slope 1 at r = 1, where the gradient is that of ``ppo``, and the slope falls off to both sides, the faster the
    larger tau. Tau is ``sapo_tau_positive`` where A > 0 and ``sapo_tau_negative`` elsewhere; the paper takes the latter
    larger. Nothing is clipped, and the value of f depends on tau: -A 2 / tau at r = 1.

    Source: SAPO, arXiv 2511.20347, which averages per sequence.

    Args:
        sapo_tau_positive: steepness tau of the gate where A > 0; above 0.
        sapo_tau_negative: steepness tau of the gate elsewhere; above 0.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
    """
    check_shapes(logprobs, old_logprobs, advantages, sequences)
    check_clamp(log_ratio_clamp)
    for name, tau in (("sapo_tau_positive", sapo_tau_positive), ("sapo_tau_negative", sapo_tau_negative)):
        if not tau > 0.0:
            raise ValueError(f"{name} must be above 0, got {tau}")
    advantages = advantages.detach()
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    tau = ratio.new_full(ratio.shape, sapo_tau_negative).masked_fill(advantages > 0, sapo_tau_positive)
    none = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyLoss(
        loss=-advantages * torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau),
        ratio=ratio.detach(),
        clipped_low=none,
        clipped_high=none,
        clipped_dual=none,
    )
