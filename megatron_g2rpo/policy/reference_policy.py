# SPDX-License-Identifier: Apache-2.0
"""The reference policy: a frozen copy of the policy, in the same layout, from which a KL term measures the distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch, TokenStats


class ReferencePolicy:
    """A frozen copy of a policy's weights, kept in host memory.

    Each rank keeps its own shards, so that the copy has the policy's layout, whatever that is. While the copy is used,
    it takes the place of the policy's weights: a GPU never holds both.

    Args:
        policy: the policy; its weights are copied when the reference policy is constructed.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy
        self._weights = [weight.detach().to("cpu", copy=True) for weight in policy.local_weights()]

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[TokenStats]:
        """Compute per-token log-probabilities and entropies under the frozen weights.

        A collective of the replica; arguments and result are those of ``MegatronPolicy.logprobs``.
        """
        with self._in_place():
            return self._policy.logprobs(batches, temperature)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        weights = self._policy.local_weights()
        current = [weight.detach().to("cpu", copy=True) for weight in weights]
        _copy(self._weights, weights)
        self._policy.weights_written()
        try:
            yield
        finally:
            _copy(current, weights)
            self._policy.weights_written()


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
