# SPDX-License-Identifier: Apache-2.0
"""The whole objective, on packed rows at any layout, against transformers' autograd through its plain formula.

The oracle holds every sequence of the global batch in one graph and writes the loss down as the papers do, with the
hinge of each task's mean entropy and GSPO's ratio as the exponential of a mean, both differentiated as they stand:

    sum_i w_i [v_i L_i + beta KL_i] / N + weight sum_t [relu(H_t - high_t) + relu(low_t - H_t)]

Used in one process by the unit tests and in several by ``tests/parallel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.policy import optimizer as policy_optimizer
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.step.importance import importance_weights
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, entropy_bounds
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import TASKS, TEMPERATURE, hf_logits
from tests.common.recipes import G2RPO

TASK_NAMES = tuple("ab"[:TASKS])
SHAPING = 0.5

# What each objective sets in the recipe. One task is above its entropy bounds, the other below.
OBJECTIVES = {
    "ppo, k3": ("name=ppo", "ratio_clip_c=1.5", "reference_policy_kl={penalty: 0.3, kind: k3}"),
    "gspo, k2, masked": (
        "name=gspo", "ratio_clip_min=0.05", "ratio_clip_max=0.05", "reference_policy_kl={penalty: 0.3, kind: k2}",
        # Not truncated: weights that differ within a sequence make it GSPO's token form, which is no function of s.
        "importance_sampling={sequence_ratio_min: 0.9, sequence_ratio_max: 1.1}",
    ),
    "cispo, truncated": ("name=cispo", "importance_sampling={truncated_ratio: 1.1}"),
    "sapo, masked": ("name=sapo", "importance_sampling={sequence_ratio_min: 0.9, sequence_ratio_max: 1.1}"),
}  # fmt: skip


def objective(name: str) -> TrainRecipe:
    """Return a recipe with one of ``OBJECTIVES``."""
    tasks = "{_override_: true, a: {entropy: {low: 0, high: 2}}, b: {entropy: {low: 8, high: 9}}}"
    overrides = [f"loss_fn.{option}" for option in OBJECTIVES[name]]
    overrides += [f"loss_fn.entropy_shaping.weight={SHAPING}", f"env.tasks={tasks}"]
    return recipes.load(G2RPO, overrides, "train")


@dataclass(frozen=True)
class Fixed:
    """Given log-probabilities of one response, float32 ``[R]`` each."""

    behaviour: Tensor
    rollout: Tensor
    reference: Tensor


def fixed_logprobs(logprobs: Sequence[Tensor]) -> list[Fixed]:
    """Return given log-probabilities near the policy's own, so that some ratios are clipped and others are not."""
    generator = torch.Generator().manual_seed(7)

    def near(values: Tensor, scale: float) -> Tensor:
        return values + scale * torch.randn(values.shape, generator=generator)

    behaviours = [near(values, 0.4) for values in logprobs]
    return [
        Fixed(behaviour=behaviour, rollout=near(behaviour, 0.3), reference=near(behaviour, 0.5))
        for behaviour in behaviours
    ]


# -- the oracle ---------------------------------------------------------------------------------------------------


def oracle(model: Any, sequences: Sequence[PackSequence], recipe: TrainRecipe) -> tuple[dict[str, Tensor], list[Fixed]]:
    """Return the plain formula's gradient by Hugging Face name, and the log-probabilities that it takes as given."""
    logprobs, entropies = zip(*(_statistics(model, sequence) for sequence in sequences), strict=True)
    fixed = fixed_logprobs([values.detach() for values in logprobs])
    options = recipe.loss_fn
    counted = [i for i, sequence in enumerate(sequences) if sequence.in_loss]
    total = sum(len(logprobs[i]) for i in counted)
    loss = torch.zeros(())
    for i in counted:
        sequence, given = sequences[i], fixed[i]
        losses = PLAIN[options.name](logprobs[i], given.behaviour, sequence.advantage, options)
        losses = losses * _importance(given, options)
        difference = logprobs[i] - given.reference
        kinds = {"k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}
        if options.reference_policy_kl.penalty:
            losses = losses + options.reference_policy_kl.penalty * kinds[options.reference_policy_kl.kind]
        loss = loss + sequence.token_weight * losses.sum() / total
    for task, name in enumerate(TASK_NAMES):
        bounds = recipe.env.tasks[name].entropy
        assert bounds is not None
        mean = torch.cat([entropies[i] for i in counted if sequences[i].task_id == task]).mean()
        assert mean > bounds.high or mean < bounds.low, "the hinge should pull"
        loss = loss + SHAPING * ((mean - bounds.high).relu() + (bounds.low - mean).relu())
    model.zero_grad()
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients, fixed


def _statistics(model: Any, sequence: PackSequence) -> tuple[Tensor, Tensor]:
    start = len(sequence.inputs.token_ids) - 1
    logits = hf_logits(model, sequence.inputs, sequence.response_ids)[start:-1].float() / TEMPERATURE
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, sequence.response_ids[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def _importance(given: Fixed, options: Any) -> Tensor:
    section = options.importance_sampling
    difference = given.behaviour - given.rollout
    weights = torch.ones_like(difference)
    if section.truncated_ratio is not None:
        weights = difference.exp().clamp(max=section.truncated_ratio)
    if section.sequence_ratio_min is not None:
        inside = section.sequence_ratio_min <= difference.mean().exp() <= section.sequence_ratio_max
        weights = weights * float(inside)
    return weights


def _clipped(ratio: Tensor, advantage: float, options: Any) -> Tensor:
    low, high, dual = 1 - options.ratio_clip_min, 1 + options.ratio_clip_max, options.ratio_clip_c
    objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if advantage < 0:
        objective = objective.clamp(min=dual * advantage)
    return -objective


def _ppo(logprobs: Tensor, behaviour: Tensor, advantage: float, options: Any) -> Tensor:
    return _clipped((logprobs - behaviour).exp(), advantage, options)


def _gspo(logprobs: Tensor, behaviour: Tensor, advantage: float, options: Any) -> Tensor:
    ratio = (logprobs - behaviour).mean().exp()
    return _clipped(ratio, advantage, options).expand(len(logprobs))


def _cispo(logprobs: Tensor, behaviour: Tensor, advantage: float, options: Any) -> Tensor:
    ratio = (logprobs - behaviour).exp().detach().clamp(1 - options.ratio_clip_min, 1 + options.ratio_clip_max)
    return -ratio * advantage * logprobs


def _sapo(logprobs: Tensor, behaviour: Tensor, advantage: float, options: Any) -> Tensor:
    tau = options.sapo_tau_positive if advantage > 0 else options.sapo_tau_negative
    return -advantage * 4 / tau * torch.sigmoid(tau * ((logprobs - behaviour).exp() - 1))


PLAIN: dict[str, Callable[[Tensor, Tensor, float, Any], Tensor]] = {
    "ppo": _ppo, "gspo": _gspo, "cispo": _cispo, "sapo": _sapo,
}  # fmt: skip


# -- ours ---------------------------------------------------------------------------------------------------------


def with_fixed(batch: PackedBatch, fixed: Sequence[Fixed], recipe: TrainRecipe) -> PackedBatch:
    """Return the packed row with the given log-probabilities and the importance weights that follow from them.

    ``batch.sequence_ids`` are indices into ``fixed``.
    """
    fields = {name: torch.zeros(len(batch.tokens)) for name in ("behaviour", "rollout", "reference")}
    for segment, row in enumerate(batch.sequence_ids.tolist()):
        if row < 0:  # a trunk has no responses
            continue
        where = (batch.task_ids >= 0) & (batch.segment_ids == segment)
        for name, values in fields.items():
            values[where] = getattr(fixed[row], name)
    row = replace(batch, behaviour_logprobs=fields["rollout"])
    return replace(
        row,
        old_logprobs=fields["behaviour"],
        importance_weights=importance_weights(recipe.loss_fn.importance_sampling, row, fields["behaviour"]),
        reference_logprobs=fields["reference"],
    )


def loss_on(policy: MegatronPolicy, batches: Sequence[PackedBatch], recipe: TrainRecipe) -> G2RPOLoss:
    """Return the objective of these packed rows, with the policy's entropies. A collective."""
    stats = policy.logprobs(batches, TEMPERATURE)
    entropies = TaskEntropies.of(list(batches), stats, TASKS, policy.groups.data)
    bounds = entropy_bounds(recipe.env, TASK_NAMES)
    return G2RPOLoss(recipe.loss_fn, bounds, TASK_NAMES, entropies, policy.groups.context)


def gradients(policy: MegatronPolicy, batches: Sequence[PackedBatch], loss: Any) -> dict[str, Tensor]:
    """Return the gradients of the loss by Hugging Face name. A collective."""
    policy.gradients(batches, loss, TEMPERATURE)
    assert policy._ddp is not None
    with policy.device.megatron():
        policy_optimizer.gather_gradients(policy._ddp)
    return {name: gradient.float().clone() for name, gradient in policy.stream(_main_grad)}


def _main_grad(weight: Any) -> Tensor:
    return weight.main_grad


def load_model(directory: Path) -> Any:
    """Load the transformers model of the directory in float32."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    return model
