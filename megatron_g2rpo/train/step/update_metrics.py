# SPDX-License-Identifier: Apache-2.0
"""The numbers of one update: what the loss says of itself, and the entropy and the gradient of each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, task_tokens
from megatron_g2rpo.types import PackedBatch


def update_metrics(
    tasks: Sequence[str], means: Mapping[str, float], entropies: TaskEntropies, loss: G2RPOLoss
) -> dict[str, float]:
    """The metrics of one update.

    Args:
        tasks: task names in the order of their ids.
        means: what ``policy.update`` returned.
        entropies: task entropies of the minibatch before the update.
        loss: the loss that the update took, with these entropies.
    """
    return {
        **{f"train/{name}": value for name, value in loss.metrics(means).items()},
        **entropy_metrics(tasks, entropies, loss),
    }


def entropy_metrics(tasks: Sequence[str], entropies: TaskEntropies, loss: G2RPOLoss) -> dict[str, float]:
    """Mean entropy of each task before the update, in nats; its side of its bounds; the value of the entropy term."""
    metrics = {"train/entropy_loss": loss.known_term.hinge}
    sides = loss.known_term.sides.tolist()
    for task, mean, count, side in zip(tasks, entropies.mean, entropies.counts, sides, strict=True):
        if count > 0:
            metrics[f"train/{task}/entropy"] = float(mean)
            metrics[f"train/{task}/entropy_side"] = float(side)
    return metrics


def task_gradient_metrics(
    policy: MegatronPolicy,
    tasks: Sequence[str],
    batches: Sequence[PackedBatch],
    loss: G2RPOLoss,
    *,
    temperature: float,
) -> dict[str, float]:
    """Norm of the gradient that each task contributes to an update, by a backward pass each. A collective.

    ``train/<task>/gradient_norm``, and ``.../gradient_share``, its share of the sum of the tasks' norms; nothing of a
    norm that is not finite.

    Args:
        policy: the policy, before the update.
        tasks: task names in the order of their ids.
        batches: this rank's micro-batches of the update.
        loss: the loss of the update.
        temperature: temperature at which the rollouts were sampled.
    """
    counts = task_tokens(batches, len(tasks), policy.groups.data)
    norms = {
        task: policy.gradient_norm(batches, loss.of_task(index), temperature)["grad_norm"]
        for index, task in enumerate(tasks)
        if counts[index] > 0
    }
    norms = {task: norm for task, norm in norms.items() if math.isfinite(norm)}
    total = sum(norms.values())
    return {
        **{f"train/{task}/gradient_norm": norm for task, norm in norms.items()},
        **({f"train/{task}/gradient_share": norm / total for task, norm in norms.items()} if total > 0 else {}),
    }
