# SPDX-License-Identifier: Apache-2.0
"""KL penalty of the policy to a reference, estimated from the sampled tokens.

With ``d = logprob - reference_logprob`` of a token that the policy sampled after its prefix, the mean over samples of
both k1 and k3 is KL(policy || reference), and that of k2 is close to it where the two are close (J. Schulman,
"Approximating KL Divergence", 2020). A term of the loss acts through its gradient, though, and the mean gradient of an
estimator is not the gradient of its mean, because the policy also decides which tokens are sampled:

======  ====================  ======  =============================================================================
kind    value                 range   mean gradient under samples of the policy
======  ====================  ======  =============================================================================
``k1``  ``d``                 any     0: nothing but noise
``k2``  ``d^2 / 2``           >= 0    that of KL(policy || reference), the reverse KL
``k3``  ``exp(-d) - 1 + d``   >= 0    that of KL(reference || policy), the forward KL; k2's to first order in d
======  ====================  ======  =============================================================================

Samples of another policy (a step of several updates, another engine) need importance weights for the statements above
to hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rpo.registry import Registry

_estimators: Registry = Registry("KL estimator")


@_estimators.register("k1")
def _k1(difference: Tensor) -> Tensor:
    return difference


@_estimators.register("k2")
def _k2(difference: Tensor) -> Tensor:
    return difference.square() / 2


@_estimators.register("k3")
def _k3(difference: Tensor) -> Tensor:
    # exp(-d) - 1 would lose d's digits where d is small, and with them the sign of the result.
    return torch.expm1(-difference) + difference


KINDS: tuple[str, ...] = _estimators.names()


def penalty(kind: str, logprobs: Tensor, reference_logprobs: Tensor, *, log_ratio_clamp: float) -> Tensor:
    """Return the KL penalty of each token; the module's table says what each kind does as a term of the loss.

    Args:
        kind: name of the estimator, one of ``KINDS``.
        logprobs: ``[S]``, log-probabilities of the sampled tokens under the policy, with gradient.
        reference_logprobs: ``[S]``, log-probabilities under the reference policy; used without gradient.
        log_ratio_clamp: differences are cut to plus or minus this; beyond it the gradient is 0.

    Returns:
        The penalties ``[S]``, to be averaged over the tokens that the loss counts.

    Raises:
        ValueError: the kind is unknown, shapes differ, or the clamp is not above 0.
    """
    estimator = _estimators.get(kind)
    if logprobs.shape != reference_logprobs.shape:
        raise ValueError(
            f"logprobs and reference_logprobs must have one shape [S], got {tuple(logprobs.shape)} and "
            f"{tuple(reference_logprobs.shape)}"
        )
    if not log_ratio_clamp > 0.0:
        raise ValueError(f"log_ratio_clamp must be above 0, got {log_ratio_clamp}")
    difference = logprobs - reference_logprobs.detach()
    return estimator(difference.clamp(-log_ratio_clamp, log_ratio_clamp))
