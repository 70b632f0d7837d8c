# SPDX-License-Identifier: Apache-2.0
"""The losses that the policy takes: the objective's per-token mathematics, summed over one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.nouns import PackedBatch, TokenStats
from megatron_g2rpo.objective import PolicyLoss, entropy, surrogates
from megatron_g2rpo.policy.megatron import LossTerms
from megatron_g2rpo.recipe import TrainRecipe


def sft_loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    """Negative log-likelihood of the response tokens."""
    nll = -(stats.logprobs * batch.token_weights).sum()
    return LossTerms(
        loss=nll,
        num_tokens=batch.num_tokens,
        sums={"entropy": (stats.entropy.detach() * batch.loss_mask).sum()},
    )


@dataclass(frozen=True)
class TaskEntropies:
    """Entropy of each task over the global minibatch, under the policy that sampled it.

    Measured once per step, before the first update: in a step of several updates the later ones see the hinge's side as
    it was then.

    Attributes:
        sums: float64 ``[T]``, nats.
        counts: float64 ``[T]``, tokens that the loss counts.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls, batches: list[PackedBatch], stats: list[TokenStats], num_tasks: int, group: dist.ProcessGroup
    ) -> TaskEntropies:
        """Sum over micro-batches and data-parallel ranks. A collective."""
        totals = torch.zeros(2, num_tasks, dtype=torch.float64)
        for batch, stat in zip(batches, stats, strict=True):
            sums, counts = entropy.task_entropy_sums(stat.entropy, batch.task_ids, batch.loss_mask, num_tasks)
            totals += torch.stack([sums, counts])
        dist.all_reduce(totals, group=group)
        return cls(sums=totals[0], counts=totals[1])

    @property
    def mean(self) -> Tensor:
        """``[T]``; NaN for a task without tokens."""
        return self.sums / self.counts


class G2RPOLoss:
    """Surrogate plus entropy shaping, for one global minibatch.

    The hinge of the entropy term is linear once its side is known for each task; the sides come from the entropies of
    the whole minibatch, so the gradient does not depend on micro-batches or layout (``objective.entropy``).

    Args:
        recipe: reads ``loss_fn`` and the entropy bounds of ``env.tasks``.
        tasks: task names in the order of their ids.
        entropies: of this minibatch.
    """

    def __init__(self, recipe: TrainRecipe, tasks: tuple[str, ...], entropies: TaskEntropies) -> None:
        options, shaping = recipe.loss_fn, recipe.loss_fn.entropy_shaping
        self._surrogate: Callable[..., PolicyLoss] = surrogates.bind(
            options.name,
            clip_low=options.ratio_clip_min,
            clip_high=options.ratio_clip_max,
            dual_clip=options.ratio_clip_c,
            log_ratio_clamp=options.log_ratio_clamp,
        )
        low, high = entropy_bounds(recipe, tasks)
        self._clamp = options.log_ratio_clamp
        self._counts = entropies.counts
        self._total = float(entropies.counts.sum())
        self._weight = shaping.weight
        self._sides = entropy.hinge_sides(entropies.sums, entropies.counts, low, high)
        self.hinge = float(entropy.hinge_loss(entropies.sums, entropies.counts, low, high, shaping.weight))

    def __call__(self, batch: PackedBatch, stats: TokenStats) -> LossTerms:
        """See ``policy.megatron.Loss``."""
        assert batch.behaviour_logprobs is not None
        result = self._surrogate(stats.logprobs, batch.behaviour_logprobs, batch.advantages)
        policy_loss = (result.loss * batch.token_weights).sum()
        device = batch.task_ids.device
        coefficients = entropy.entropy_loss_weights(
            batch.task_ids,
            batch.loss_mask,
            self._sides.to(device),
            self._counts.to(device),
            self._weight,
            self._total,
        )
        entropy_term = (coefficients * stats.entropy).sum()
        log_ratio = (stats.logprobs - batch.behaviour_logprobs).detach().clamp(-self._clamp, self._clamp)
        return LossTerms(
            loss=policy_loss + entropy_term,
            num_tokens=batch.num_tokens,
            sums={
                "policy_loss": policy_loss.detach(),
                "entropy": (stats.entropy.detach() * batch.loss_mask).sum(),
                # k3, Schulman's low-variance estimate of KL(behaviour || policy).
                "kl": ((log_ratio.exp() - 1 - log_ratio) * batch.loss_mask).sum(),
                **result.sums(batch.loss_mask),
            },
        )


def entropy_bounds(recipe: TrainRecipe, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Lower and upper entropy bound of each task, float64 ``[T]``; infinite where nothing is shaped."""
    low = torch.full((len(tasks),), -torch.inf, dtype=torch.float64)
    high = torch.full((len(tasks),), torch.inf, dtype=torch.float64)
    if recipe.loss_fn.entropy_shaping.enabled:
        for index, task in enumerate(tasks):
            bounds = recipe.env.tasks[task].entropy
            if bounds is not None:
                low[index], high[index] = bounds.low, bounds.high
    return low, high
