# SPDX-License-Identifier: Apache-2.0
"""Claims: a divergence in the reward is each response's own sum; importance weights are those the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.step.importance import importance_weights
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.train.step.old_logprobs import reference_kl
from megatron_g2rpo.types import ModelInputs, PackedBatch

MakeRecipe = Callable[..., TrainRecipe]
LENGTHS = (3, 1, 4, 2)


def rows(order: list[int], budget: int = 12) -> tuple[list[PackedBatch], dict[int, tuple[Tensor, Tensor]]]:
    """The responses packed in that order, two short rows; behaviour and reference log-probabilities of each."""
    generator = torch.Generator().manual_seed(sum(order))
    inputs = ModelInputs(
        token_ids=torch.arange(4), pixel_values=torch.zeros(0, 6), image_grid_thw=torch.zeros(0, 3, dtype=torch.int64)
    )
    items = [PackSequence(inputs=inputs, response_ids=torch.arange(LENGTHS[i]), in_loss=i != 2) for i in order]
    packed = Packer(image_token_id=-1, spatial_merge_size=1, pad_token_id=0).pack(items, budget=budget)
    given: dict[int, tuple[Tensor, Tensor]] = {}
    filled = []
    for row in packed:
        behaviour, reference = torch.zeros(2, len(row.tokens))
        for segment, index in enumerate(row.sequence_ids.tolist()):
            where = (row.task_ids >= 0) & (row.segment_ids == segment)
            behaviour[where], reference[where] = -torch.rand(2, int(where.sum()), generator=generator)
            given[order[index]] = (behaviour[where], reference[where])
        filled.append(replace(row, old_logprobs=behaviour, reference_logprobs=reference))
    return filled, given


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_divergence_of_a_response_is_the_sum_over_its_tokens(make_recipe: MakeRecipe, kind: str) -> None:
    recipe = make_recipe(f"loss_fn.reference_policy_kl={{penalty: 0.1, kind: {kind}, where: reward}}")
    (first, given), (second, more) = rows([3, 0]), rows([2, 1])
    assert len(first + second) > 2, "one row would not show that rows are told apart"
    minibatches = [Minibatch(torch.tensor([3, 0]), first), Minibatch(torch.tensor([2, 1]), second)]
    actual = reference_kl(recipe.loss_fn, minibatches)
    for number, (behaviour, reference) in {**given, **more}.items():
        difference = (behaviour - reference).double()
        kinds = {"k1": difference, "k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}
        # A response that is kept out of the loss is still rewarded. float32 tokens.
        assert float(actual[number]) == pytest.approx(float(kinds[kind].sum()), rel=1e-5)


def test_k1_is_for_the_reward_alone(make_recipe: MakeRecipe) -> None:
    with pytest.raises(Exception, match="the gradient of k1 in the loss has expectation 0"):
        make_recipe("loss_fn.reference_policy_kl={penalty: 0.1, kind: k1, where: loss}")


def test_importance_weights_are_those_that_are_asked_for(make_recipe: MakeRecipe) -> None:
    packed, _ = rows([3, 0], budget=20)
    row = replace(packed[0], behaviour_logprobs=packed[0].reference_logprobs)
    behaviour = row.old_logprobs
    assert behaviour is not None

    def weights(**options: Any) -> Tensor | None:
        overrides = [f"loss_fn.importance_sampling.{name}={value}" for name, value in options.items()]
        return importance_weights(make_recipe(*overrides).loss_fn.importance_sampling, row, behaviour)

    assert weights() is None
    ratio = (behaviour - row.behaviour_logprobs).exp()
    assert torch.equal(weights(truncated_ratio=1.05), ratio.clamp(max=1.05))  # type: ignore[arg-type]
    masked = weights(sequence_ratio_max=1.0)
    assert masked is not None
    for segment in range(len(row.sequence_ids)):
        mine = (row.task_ids >= 0) & (row.segment_ids == segment)
        inside = float((behaviour - row.behaviour_logprobs)[mine].mean()) <= 0.0
        assert masked[mine].tolist() == [float(inside)] * int(mine.sum())
