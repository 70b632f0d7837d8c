# SPDX-License-Identifier: Apache-2.0
"""One step of the trainer from packed rows on, with old log-probabilities from a pass of their own or from its update.

Used in one process by the unit tests and in several by ``tests/parallel``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.recipe import Policy, TrainRecipe
from megatron_g2rpo.train import g2rpo
from megatron_g2rpo.train.step import old_logprobs
from megatron_g2rpo.train.step.metrics import gap_metrics, importance_metrics
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.train.step.timers import Timers
from tests.common.hardware import this_device
from tests.common.objective_parity import TASK_NAMES
from tests.common.parity import TASKS, packer_for, parity_sequences, sequences_by_rank
from tests.common.recipes import G2RPO

# Of two tasks one is above its entropy bounds and one below: the entropy term pulls on both.
_TASKS = "env.tasks={_override_: true, a: {entropy: {low: 0, high: 2}}, b: {entropy: {low: 8, high: 9}}}"
_SHAPED = ("loss_fn.entropy_shaping.weight=0.5", _TASKS)
_UNSHAPED = ("loss_fn.entropy_shaping.enabled=false", _TASKS)
_MASKED = "loss_fn.importance_sampling={truncated_ratio: 1.1, sequence_ratio_min: 0.9, sequence_ratio_max: 1.1}"
ROW = 10_000  # tokens: everything in one micro-batch
ROWS = 96  # tokens: several micro-batches

# name -> (overrides, tokens of a row): each needs no old log-probabilities before its first update.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "entropy shaping, one row": (_SHAPED, ROW),
    "masked sequences, one row": ((*_SHAPED, _MASKED), ROW),
    "masked sequences, several rows": ((*_UNSHAPED, _MASKED), ROWS),
    "gspo, kl, task gradients": (
        (*_SHAPED, "loss_fn.name=gspo", "grpo.task_gradient_period=1", "loss_fn.reference_policy_kl.penalty=0.3"),
        ROW,
    ),
}


def recipe_of(*overrides: str) -> TrainRecipe:
    """Return the exemplar with two tasks, and the keys of a case."""
    return recipes.load(G2RPO, ["grpo.task_gradient_period=0", *overrides], "train")


@dataclass(frozen=True)
class Taken:
    """What a step came to.

    Attributes:
        metrics: of its updates, and those that are computed from old log-probabilities.
        weights: by Hugging Face name, after the step.
        passes: number of passes without gradient, those of a reference policy included.
    """

    metrics: dict[str, float]
    weights: dict[str, Tensor]
    passes: int


def take_step(options: Policy, recipe: TrainRecipe, row_tokens: int, *, beforehand: bool, updates: int = 1) -> Taken:
    """Take a step on the parity check's sequences. A collective of all ranks.

    Args:
        options: the policy's section, for a tiny model at some layout.
        recipe: the recipe of loss and tasks.
        row_tokens: largest number of tokens of a micro-batch.
        beforehand: compute old log-probabilities and entropies in passes of their own, whatever needs them.
        updates: number of updates of the step, on the same rows.
    """
    policy = MegatronPolicy(options, this_device(), seed=0, max_steps=10)
    minibatch = _minibatch(policy, row_tokens)
    components: Any = SimpleNamespace(
        policy=policy, tasks=TASK_NAMES, guard=SimpleNamespace(skips=lambda loss, norm: False)
    )
    timers, metrics = Timers(policy.device), {}
    reference = ReferencePolicy(policy) if recipe.loss_fn.reference_policy_kl.penalty else None
    always = mock.patch.object(old_logprobs, "needs_old_logprobs", return_value=True)
    with mock.patch.object(policy, "logprobs", side_effect=policy.logprobs) as passes:
        with always if beforehand else nullcontext():
            minibatches, entropies = old_logprobs.add_logprobs(
                recipe, policy, reference, [minibatch] * updates, num_tasks=TASKS
            )
        for number in range(updates):
            of_update, minibatches[number] = g2rpo.update(
                recipe, components, 1, number, minibatches[number], entropies[number], timers
            )
            metrics |= {f"{number} {name}": value for name, value in of_update.items()}
    batches = [batch for each in minibatches for batch in each.micro_batches]
    metrics |= gap_metrics(TASK_NAMES, batches, policy.groups.data)
    metrics |= importance_metrics(1.1, batches, policy.groups.data)
    weights = {name: tensor.clone() for name, tensor in policy.stream()}
    return Taken(metrics=metrics, weights=weights, passes=passes.call_count)


def _minibatch(policy: MegatronPolicy, row_tokens: int) -> Minibatch:
    """This data-parallel rank's rows, as many as on the others; engine log-probabilities are near the policy's own."""
    sequences = parity_sequences(policy.hf_config)
    packer = packer_for(policy.hf_config, policy.layout)
    mine = sequences_by_rank(len(sequences), policy.groups.data_size, idle=False)
    rows = max(len(packer.bins([sequences[index] for index in owned], row_tokens)) for owned in mine)
    owned = mine[policy.groups.data_rank]
    batches = packer.pack([sequences[index] for index in owned], row_tokens, rows)
    stats = policy.logprobs(batches)
    near = []
    for batch, stat in zip(batches, stats, strict=True):
        noise = torch.zeros(len(batch.tokens))
        for segment, index in enumerate(batch.sequence_ids.tolist()):
            where = (batch.task_ids >= 0) & (batch.segment_ids == segment)
            generator = torch.Generator().manual_seed(owned[index])  # the same at every layout
            noise[where] = 0.3 * torch.randn(int(where.sum()), generator=generator)
        near.append(replace(batch, behaviour_logprobs=stat.logprobs + noise))
    return Minibatch(rollouts=torch.arange(len(owned)), micro_batches=near)


def differences(one: Taken, two: Taken) -> list[str]:
    """Names of the metrics and weights that are not equal bit for bit, or that only one of them has."""
    metrics = [
        f"{name}: {one.metrics.get(name)} {two.metrics.get(name)}"
        for name in sorted(one.metrics.keys() | two.metrics.keys())
        if one.metrics.get(name) != two.metrics.get(name)
    ]
    return metrics + [name for name in one.weights if not torch.equal(one.weights[name], two.weights[name])]
