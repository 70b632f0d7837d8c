# SPDX-License-Identifier: Apache-2.0
"""A frozen copy of the policy, in the same layout: what a KL term measures the distance from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch, TokenStats


class ReferencePolicy:
    """The weights that a policy has now, kept in host memory.

    Each rank keeps its own shards, so that the copy has the policy's layout, whatever it is. To be used, they take the
    place of the policy's weights: a GPU never holds both.

    Args:
        policy: the policy; the copy is taken at once.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy
        self._weights = [weight.detach().to("cpu", copy=True) for weight in policy.local_weights()]

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[TokenStats]:
        """As ``MegatronPolicy.logprobs``, under the frozen weights. A collective of the replica."""
        with self._in_place():
            return self._policy.logprobs(batches, temperature)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        weights = self._policy.local_weights()
        current = [weight.detach().to("cpu", copy=True) for weight in weights]
        _copy(self._weights, weights)
        try:
            yield
        finally:
            _copy(current, weights)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
