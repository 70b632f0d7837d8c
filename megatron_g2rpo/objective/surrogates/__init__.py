# SPDX-License-Identifier: Apache-2.0
"""Policy surrogates: per-token losses that the caller averages, found by the name that a recipe uses.

Shape letter: ``S`` tokens of (a share of) a packed row. A surrogate is called as ``(logprobs, old_logprobs,
advantages, sequences, **options)``. Positions outside the loss mask are computed like the others and must be masked
when summing. A new one is a function with the decorator ``register`` in a file that is imported here; its keyword-only
parameters are its options.

All surrogates take these arguments:

- ``logprobs``: ``[S]``, log-probabilities of the sampled tokens under the policy, with gradient.
- ``old_logprobs``: ``[S]``, log-probabilities under the old policy, which is fixed for the step; used without gradient.
- ``advantages``: ``[S]``, advantage of each token; used without gradient.
- ``sequences``: which sequence each token belongs to, for surrogates whose token loss depends on other tokens.
- ``log_ratio_clamp``: above 0. Log-ratios are cut to plus or minus this before the exponential, so that a token can't
  overflow the loss; the gradient through a ratio beyond it is 0.
"""

from megatron_g2rpo.objective.surrogates import cispo, clipped, sapo  # noqa: F401  (they register themselves)
from megatron_g2rpo.objective.surrogates.base import PolicyLoss, bind, get, names, options, register

__all__ = ["PolicyLoss", "bind", "get", "names", "options", "register"]
