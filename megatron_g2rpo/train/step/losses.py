# SPDX-License-Identifier: Apache-2.0
"""The losses that the policy takes: the objective's per-token mathematics, summed over one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.objective import PolicyLoss, entropy, kl
from megatron_g2rpo.policy.megatron import Loss, LossTerms
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.recipe.loss_section import LossFn
from megatron_g2rpo.train.step.importance import importance_weights, sequences_of
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
            batches: this rank's micro-batches, or its context-parallel shares of them.
            stats: the statistics of each under the policy.
            num_tasks: number of tasks that the recipe lists.
            group: process group of the data-parallel ranks, and for shares of the context-parallel ranks as well.
        """
        totals = torch.zeros(2, num_tasks, dtype=torch.float64)
        for batch, stat in zip(batches, stats, strict=True):
            sums, counts = entropy.task_entropy_sums(stat.entropy, batch.task_ids, batch.loss_mask, num_tasks)
            totals += torch.stack([sums, counts]).cpu()
        all_reduce(totals, group=group)
        return cls(sums=totals[0], counts=totals[1])

    @property
    def mean(self) -> Tensor:
        """Mean token entropy of each task, float64 ``[T]``, nats; NaN for a task without tokens."""
        return self.sums / self.counts


def task_tokens(batches: Sequence[PackedBatch], num_tasks: int, group: dist.ProcessGroup) -> Tensor:
    """Tokens of each task that the loss counts, over a minibatch: float64 ``[T]``. A collective of the group.

    Args:
        batches: this rank's micro-batches.
        num_tasks: number of tasks that the recipe lists.
        group: process group of the data-parallel ranks.
    """
    counts = torch.zeros(num_tasks, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.task_ids[batch.loss_mask != 0], minlength=num_tasks)
    all_reduce(counts, group=group)
    return counts


class G2RPOLoss:
    """Surrogate, KL term and entropy shaping, for one global minibatch.

    The hinge of the entropy term is linear once its side is known for each task; the sides come from the entropies of
    the whole minibatch, so the gradient does not depend on micro-batches or layout (``objective.entropy``).

    Where a micro-batch has no old log-probabilities, they are the current ones, without gradient, and importance
    weights follow from them: the update is the first since the old policy.

    Args:
        options: the recipe's ``loss_fn``.
        bounds: lower and upper entropy bound of each task, float64 ``[T]`` in nats, see ``entropy_bounds``; they are
            read where ``loss_fn.entropy_shaping`` is enabled.
        tasks: task names in the order of their ids.
        entropies: task entropies of this minibatch; None: those of the one micro-batch that the loss is then called
            with on each rank, under the weights of that pass.
        context: process group of the ranks that hold other tokens of the same sequences.
        data_context: process group of the ranks that hold other tokens of the minibatch. The loss is a collective of
            them where ``entropies`` is None and the entropy is shaped.

    Attributes:
        term: the entropy term; None before the entropies are known, see ``with_entropies``.
    """

    def __init__(
        self,
        options: LossFn,
        bounds: tuple[Tensor, Tensor],
        tasks: tuple[str, ...],
        entropies: TaskEntropies | None,
        context: dist.ProcessGroup,
        data_context: dist.ProcessGroup | None = None,
    ) -> None:
        self._surrogate, self._importance = options.bound(), options.importance_sampling
        self._clamp = options.log_ratio_clamp
        # In the reward it is part of the advantages.
        divergence = options.reference_policy_kl
        self._kl = divergence if divergence.where == "loss" and divergence.penalty > 0.0 else None
        self._tasks, self._context, self._data_context = tasks, context, data_context
        self._shaping = options.entropy_shaping
        self._bounds = bounds if self._shaping.enabled else _no_bounds(len(tasks))
        self._task: int | None = None
        self.term: EntropyTerm | None = None
        if entropies is not None:
            self.term = EntropyTerm(entropies, self._bounds, self._shaping.weight)

    def with_entropies(self, entropies: TaskEntropies) -> G2RPOLoss:
        """Return the loss with the task entropies of its minibatch."""
        loss = copy(self)
        loss.term = EntropyTerm(entropies, self._bounds, self._shaping.weight)
        return loss

    @property
    def known_term(self) -> EntropyTerm:
        """The entropy term.

        Raises:
            RuntimeError: the entropies of the minibatch are not known yet.
        """
        if self.term is None:
            raise RuntimeError("the loss does not know the entropies of its minibatch: call with_entropies first")
        return self.term

    def of_task(self, task: int) -> Loss:
        """What one task contributes: these losses of all tasks add up to the whole, and so do their gradients.

        Args:
            task: id of the task.
        """
        share = copy(self)
        share._task = task

        def loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
            mine = batch.task_ids == task
            return share(replace(batch, token_weights=batch.token_weights * mine), stats)

        return loss

    def __call__(self, batch: PackedBatch, stats: TokenStats) -> LossTerms:
        """Loss and metrics of one micro-batch; see ``policy.megatron.Loss``."""
        old, importance = batch.old_logprobs, batch.importance_weights
        if old is None:
            old = stats.logprobs.detach()
            importance = importance_weights(self._importance, batch, old, self._context)
        sequences = sequences_of(batch, self._context)
        result = self._surrogate(stats.logprobs, old, batch.advantages, sequences)
        policy_loss = (result.loss * batch.token_weights * (1.0 if importance is None else importance)).sum()
        # The tokens are samples of the old policy: KL(old || current).
        moved = kl.penalty("k3", old, stats.logprobs.detach(), log_ratio_clamp=self._clamp)
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
        """Turn the metrics of single tasks into means over the task's tokens. The entropies must be known.

        Args:
            means: what ``policy.update`` returned: means over the tokens of all tasks.
        """
        counts, metrics = self.known_term.counts, dict(means)
        for task, count in zip(self._tasks, counts.tolist(), strict=True):
            clipped = metrics.pop(f"{task}/clipped")
            if count > 0:
                metrics[f"{task}/clipped"] = clipped * float(counts.sum()) / count
        return metrics

    def _entropy_term(self, batch: PackedBatch, stats: TokenStats) -> Tensor:
        term = self.term
        if term is None:
            if not (self._shaping.weight > 0 and bool(torch.cat(self._bounds).isfinite().any())):
                return stats.entropy.new_zeros(())  # whatever the entropies, there is no term
            term = EntropyTerm(self._entropies_of(batch, stats), self._bounds, self._shaping.weight)
        return term(batch, stats, self._task)

    def _entropies_of(self, batch: PackedBatch, stats: TokenStats) -> TaskEntropies:
        if self._data_context is None:
            raise RuntimeError("a loss without entropies needs the process group that its minibatch is spread over")
        return TaskEntropies.of([batch], [stats], len(self._tasks), self._data_context)

    def _clipped_by_task(self, batch: PackedBatch, result: PolicyLoss) -> dict[str, Tensor]:
        clipped = (result.clipped_low | result.clipped_high | result.clipped_dual) & (batch.loss_mask != 0)
        return {f"{task}/clipped": (clipped & (batch.task_ids == i)).sum() for i, task in enumerate(self._tasks)}


class EntropyTerm:
    """Entropy shaping of one global minibatch, whose sides are known.

    Args:
        entropies: task entropies of the minibatch.
        bounds: lower and upper entropy bound of each task, float64 ``[T]`` in nats.
        weight: weight of the term.

    Attributes:
        counts: float64 ``[T]``, tokens of each task that the loss counts.
        hinge: value of the term, in units of the loss.
        sides: int64 ``[T]``, +1 for a task above its entropy bounds, -1 below, 0 between.
    """

    def __init__(self, entropies: TaskEntropies, bounds: tuple[Tensor, Tensor], weight: float) -> None:
        self.counts, self._weight = entropies.counts, weight
        self._total = float(entropies.counts.sum())
        self.sides = entropy.hinge_sides(entropies.sums, entropies.counts, *bounds)
        self.hinge = float(entropy.hinge_loss(entropies.sums, entropies.counts, *bounds, weight))

    def __call__(self, batch: PackedBatch, stats: TokenStats, task: int | None = None) -> Tensor:
        """The term of one micro-batch, a sum over tokens with gradient.

        Args:
            batch: a micro-batch, or a context-parallel rank's share of one.
            stats: its statistics under the policy.
            task: id of the only task whose entropy counts; None: all do.
        """
        device, sides = batch.task_ids.device, self.sides
        if task is not None:
            sides = torch.where(torch.arange(len(sides)) == task, sides, 0)
        coefficients = entropy.entropy_loss_weights(
            batch.task_ids, batch.loss_mask, sides.to(device), self.counts.to(device), self._weight, self._total
        )
        return (coefficients * stats.entropy).sum()


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
