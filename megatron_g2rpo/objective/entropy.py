# SPDX-License-Identifier: Apache-2.0
"""Entropy shaping, which keeps the mean token entropy of every task between two bounds.

The loss is ``w * sum_t [relu(H_t - high_t) + relu(low_t - H_t)]``, where H_t is the mean entropy of the response tokens
of task t in the global minibatch (arXiv 2604.08539). A hinge of a mean is not a sum over micro-batches. But its
gradient is that of a linear term once the side of the hinge is known for each task:

1. ``task_entropy_sums`` per micro-batch, added up and all-reduced over the ranks that hold other tokens;
2. ``hinge_sides`` from these global sums: +1 above, -1 below, 0 between the bounds;
3. ``entropy_loss_weights`` per micro-batch, multiplied with the entropies that carry gradient.

The gradient then depends neither on the micro-batching nor on the layout. Shape letters: ``S`` tokens of a packed row,
``T`` tasks, numbered 0..T-1. Entropies are in nats. A task that is not shaped has the bounds -inf and inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def task_entropy_sums(entropy: Tensor, task_ids: Tensor, mask: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Sum token entropies by task; both results add up over micro-batches and ranks.

    Args:
        entropy: ``[S]``, entropy of each token; used without gradient.
        task_ids: int64 ``[S]``, task of each token; may be -1 where ``mask`` is 0.
        mask: ``[S]``, not 0 at response tokens.
        num_tasks: number of tasks, T.

    Returns:
        The entropy sums, float64 ``[T]``, and the token counts, float64 ``[T]``.
    """
    kept = mask != 0
    bins = torch.where(kept, task_ids, num_tasks)
    sums = torch.zeros(num_tasks + 1, dtype=torch.float64, device=entropy.device)
    counts = sums.clone()
    sums.index_add_(0, bins, torch.where(kept, entropy.detach(), 0.0).double())
    counts.index_add_(0, bins, kept.double())
    return sums[:num_tasks], counts[:num_tasks]


def hinge_loss(entropy_sums: Tensor, token_counts: Tensor, low: Tensor, high: Tensor, weight: float) -> Tensor:
    """Return the value of the loss, computed from global sums: a scalar for the metrics.

    Args:
        entropy_sums: ``[T]``, sums over the global minibatch.
        token_counts: ``[T]``, number of response tokens in the global minibatch.
        low: ``[T]``, lower bounds.
        high: ``[T]``, upper bounds.
        weight: weight w of the loss.

    Raises:
        ValueError: a lower bound is above its upper bound.
    """
    above, below = _distances(entropy_sums, token_counts, low, high)
    return weight * (above.relu() + below.relu()).sum()


def hinge_sides(entropy_sums: Tensor, token_counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the side of its bounds that each task is on: +1 above ``high``, -1 below ``low``, 0 between or no tokens.

    Args:
        entropy_sums: ``[T]``, sums over the global minibatch.
        token_counts: ``[T]``, number of response tokens in the global minibatch.
        low: ``[T]``, lower bounds.
        high: ``[T]``, upper bounds.

    Returns:
        int64 ``[T]``: the slope of the hinge in H_t.

    Raises:
        ValueError: a lower bound is above its upper bound.
    """
    above, below = _distances(entropy_sums, token_counts, low, high)
    return (above > 0).long() - (below > 0).long()


def entropy_loss_weights(
    task_ids: Tensor, mask: Tensor, sides: Tensor, task_counts: Tensor, weight: float, total_tokens: float
) -> Tensor:
    """Return c with ``sum(c * H) / total_tokens == w * sum_t side_t * mean_t(H)`` over the global minibatch.

    The division by ``total_tokens`` is that of the whole loss, which the caller applies to the policy loss as well.

    Args:
        task_ids: int64 ``[S]``, task of each token; may be -1 where ``mask`` is 0.
        mask: ``[S]``, not 0 at response tokens.
        sides: ``[T]`` from ``hinge_sides``.
        task_counts: ``[T]``, number of response tokens of each task in the global minibatch.
        weight: weight w of the loss.
        total_tokens: number that the summed loss of the global minibatch is divided by.

    Returns:
        The coefficients, float32 ``[S]``, 0 where ``mask`` is 0.
    """
    # Only tasks that are shaped divide by their count: absent ones have neither a side nor a count.
    per_task = weight * total_tokens * sides.double() / torch.where(sides != 0, task_counts, 1)
    kept = mask != 0
    # index_select, unlike indexing, refuses the id -1 of a token that the mask wrongly keeps.
    per_token = per_task.index_select(0, torch.where(kept, task_ids, 0))
    return torch.where(kept, per_token, 0.0).float()


def _distances(entropy_sums: Tensor, token_counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signed distances (H - high, low - H) of each task; -inf for tasks without tokens."""
    if not bool((low <= high).all()):
        raise ValueError(
            f"entropy bounds need low <= high for every task, got low {low.tolist()}, high {high.tolist()}"
        )
    present = token_counts > 0
    mean = entropy_sums / torch.where(present, token_counts, 1)
    absent = torch.full_like(mean, -torch.inf)
    return torch.where(present, mean - high, absent), torch.where(present, low - mean, absent)
