# SPDX-License-Identifier: Apache-2.0
"""The losses that the policy takes: the objective's per-token mathematics, summed over one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import PolicyLoss, Sequences, entropy, kl
from megatron_g2rpo.policy.megatron import Loss, LossTerms
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.recipe.loss_section import LossFn
from megatron_g2rpo.types import PackedBatch, TokenStats


def sft_loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    """Negative log-likelihood of the response tokens of a micro-batch; see ``policy.megatron.Loss``."""
    nll = -(stats.logprobs * batch.token_weights).sum()
    return LossTerms(
        loss=nll,
        num_tokens=batch.num_tokens,
        sums={"entropy": (stats.entropy.detach() * batch.loss_mask).sum()},
    )


@dataclass(frozen=True)
class TaskEntropies:
    """Entropy of each task over the global minibatch, under one policy.

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
        """Sum the entropies of a minibatch over micro-batches and data-parallel ranks. A collective.

        Args:
            batches: this rank's micro-batches.
            stats: the statistics of each under the policy.
            num_tasks: number of tasks that the recipe lists.
            group: process group of the data-parallel ranks.
        """
        totals = torch.zeros(2, num_tasks, dtype=torch.float64)
        for batch, stat in zip(batches, stats, strict=True):
            sums, counts = entropy.task_entropy_sums(stat.entropy, batch.task_ids, batch.loss_mask, num_tasks)
            totals += torch.stack([sums, counts])
        dist.all_reduce(totals, group=group)
        return cls(sums=totals[0], counts=totals[1])

    @property
    def mean(self) -> Tensor:
        """Mean token entropy of each task, float64 ``[T]``, nats; NaN for a task without tokens."""
        return self.sums / self.counts


class G2RPOLoss:
    """Surrogate, KL term and entropy shaping, for one global minibatch.

    The hinge of the entropy term is linear once its side is known for each task; the sides come from the entropies of
    the whole minibatch, so the gradient does not depend on micro-batches or layout (``objective.entropy``).

    Args:
        options: the recipe's ``loss_fn``.
        bounds: lower and upper entropy bound of each task, float64 ``[T]`` in nats, see ``entropy_bounds``; they are
            read where ``loss_fn.entropy_shaping`` is enabled.
        tasks: task names in the order of their ids.
        entropies: task entropies of this minibatch.
        context: process group of the ranks that hold other tokens of the same sequences.

    Attributes:
        hinge: value of the entropy term, in units of the loss.
        sides: int64 ``[T]``, +1 for a task above its entropy bounds, -1 below, 0 between.
    """

    def __init__(
        self,
        options: LossFn,
        bounds: tuple[Tensor, Tensor],
        tasks: tuple[str, ...],
        entropies: TaskEntropies,
        context: dist.ProcessGroup,
    ) -> None:
        self._surrogate = options.bound()
        self._clamp = options.log_ratio_clamp
        # In the reward it is part of the advantages.
        divergence = options.reference_policy_kl
        self._kl = divergence if divergence.where == "loss" and divergence.penalty > 0.0 else None
        self._tasks, self._context = tasks, context
        self._counts = entropies.counts
        self._total = float(entropies.counts.sum())
        shaping = options.entropy_shaping
        self._weight = shaping.weight
        low, high = bounds if shaping.enabled else _no_bounds(len(tasks))
        self.sides = entropy.hinge_sides(entropies.sums, entropies.counts, low, high)
        self.hinge = float(entropy.hinge_loss(entropies.sums, entropies.counts, low, high, shaping.weight))

    def of_task(self, task: int) -> Loss:
        """What one task contributes: these losses of all tasks add up to the whole, and so do their gradients.

        Args:
            task: id of the task.
        """
        share = copy(self)
        share.sides = torch.where(torch.arange(len(self.sides)) == task, self.sides, 0)

        def loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
            mine = batch.task_ids == task
            return share(replace(batch, token_weights=batch.token_weights * mine), stats)

        return loss

    def __call__(self, batch: PackedBatch, stats: TokenStats) -> LossTerms:
        """Loss and metrics of one micro-batch; see ``policy.megatron.Loss``."""
        assert batch.old_logprobs is not None
        sequences = sequences_of(batch, self._context)
        result = self._surrogate(stats.logprobs, batch.old_logprobs, batch.advantages, sequences)
        importance = 1.0 if batch.importance_weights is None else batch.importance_weights
        policy_loss = (result.loss * batch.token_weights * importance).sum()
        # The tokens are samples of the old policy: KL(old || current).
        moved = kl.penalty("k3", batch.old_logprobs, stats.logprobs.detach(), log_ratio_clamp=self._clamp)
        loss, sums = policy_loss + self._entropy_term(batch, stats), {}
        if self._kl is not None:
            assert batch.reference_logprobs is not None
            divergence = kl.penalty(
                self._kl.kind, stats.logprobs, batch.reference_logprobs, log_ratio_clamp=self._clamp
            )
            loss = loss + self._kl.penalty * (divergence * batch.token_weights).sum()
            sums["reference_kl"] = (divergence.detach() * batch.loss_mask).sum()
        return LossTerms(
            loss=loss,
            num_tokens=batch.num_tokens,
            sums={
                **sums,
                "policy_loss": policy_loss.detach(),
                "entropy": (stats.entropy.detach() * batch.loss_mask).sum(),
                "kl": (moved * batch.loss_mask).sum(),
                **result.sums(batch.loss_mask),
                **self._clipped_by_task(batch, result),
            },
        )

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Turn the metrics of single tasks into means over the task's tokens.

        Args:
            means: what ``policy.update`` returned: means over the tokens of all tasks.
        """
        metrics = dict(means)
        for task, count in zip(self._tasks, self._counts.tolist(), strict=True):
            clipped = metrics.pop(f"{task}/clipped")
            if count > 0:
                metrics[f"{task}/clipped"] = clipped * self._total / count
        return metrics

    def _entropy_term(self, batch: PackedBatch, stats: TokenStats) -> Tensor:
        device = batch.task_ids.device
        coefficients = entropy.entropy_loss_weights(
            batch.task_ids, batch.loss_mask, self.sides.to(device), self._counts.to(device), self._weight, self._total
        )
        return (coefficients * stats.entropy).sum()

    def _clipped_by_task(self, batch: PackedBatch, result: PolicyLoss) -> dict[str, Tensor]:
        clipped = (result.clipped_low | result.clipped_high | result.clipped_dual) & (batch.loss_mask != 0)
        return {f"{task}/clipped": (clipped & (batch.task_ids == i)).sum() for i, task in enumerate(self._tasks)}


def sequences_of(batch: PackedBatch, context: dist.ProcessGroup | None = None) -> Sequences:
    """Which sequence each token of a micro-batch counts for.

    Args:
        batch: a micro-batch, or a context-parallel rank's share of one.
        context: process group of the ranks with the other shares; None for a whole micro-batch.
    """
    ids = torch.where(batch.loss_mask != 0, batch.segment_ids, -1)
    size = len(batch.cu_seqlens) - 1
    if context is None or context.size() == 1:
        return Sequences(ids=ids, size=size)

    def reduce(sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=context)
        return sums

    return Sequences(ids=ids, size=size, reduce=reduce)


def entropy_bounds(env: Env, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Lower and upper entropy bound of each task, float64 ``[T]``, nats; infinite for a task without bounds.

    Args:
        env: the recipe's section, whose tasks may have bounds.
        tasks: task names in the order of their ids.
    """
    low, high = _no_bounds(len(tasks))
    for index, task in enumerate(tasks):
        bounds = env.tasks[task].entropy
        if bounds is not None:
            low[index], high[index] = bounds.low, bounds.high
    return low, high


def _no_bounds(num_tasks: int) -> tuple[Tensor, Tensor]:
    infinity = torch.full((num_tasks,), torch.inf, dtype=torch.float64)
    return -infinity, infinity
