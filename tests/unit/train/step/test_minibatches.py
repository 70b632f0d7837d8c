# SPDX-License-Identifier: Apache-2.0
"""Claims: a step's rollouts are split as the recipe says, whatever the number of ranks, and weighted as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, response_values
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.step import minibatches
from megatron_g2rpo.train.step.minibatches import owned_prompts, pack_minibatches
from megatron_g2rpo.types import ModelInputs, PackedBatch, Prompt, Rollout, Sample

MakeRecipe = Callable[..., TrainRecipe]

SAMPLES = 2
LENGTHS = (1, 5, 3, 8, 2, 4, 7, 6)  # of the responses of four groups of two
TRUNCATED = (3, 6)  # rollouts that the token limit ended


PACKER = Packer(image_token_id=90, spatial_merge_size=2, pad_token_id=99)


@pytest.fixture(autouse=True)
def _world() -> None:
    """A world of one."""
    init_process_group(select("cpu"))


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    """Recipes of four prompts, two samples each, with 24 tokens a row."""

    def make(*overrides: str) -> TrainRecipe:
        return make_recipe(
            "grpo.num_prompts_per_step=4", f"grpo.num_generations_per_prompt={SAMPLES}",
            "policy.max_total_sequence_length=24", "policy.sequence_packing.train_mb_tokens=24",
            "policy.generation.max_new_tokens=8", "env.tasks._override_=true",
            "env.tasks.a={entropy: null}", "env.tasks.b={entropy: null}",
            "policy.train_global_batch_size=8", *overrides,
        )  # fmt: skip

    return make


def prompt(number: int, tokens: int = 5) -> Prompt:
    inputs = ModelInputs(
        token_ids=torch.arange(tokens) + number,
        pixel_values=torch.zeros(0, 6),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
    )
    sample = Sample(key=f"s/{number}", task="ab"[number % 2], question="", answer="", answer_format="exact")
    return Prompt(sample=sample, inputs=inputs, task_id=number % 2)


def rollouts() -> list[Rollout]:
    prompts = [prompt(number) for number in range(len(LENGTHS) // SAMPLES)]
    return [
        Rollout(
            prompt=prompts[row // SAMPLES],
            group_id=row // SAMPLES,
            sample_index=row % SAMPLES,
            response_ids=torch.full((length,), row),
            logprobs=torch.full((length,), -row / 10),
            text="",
            truncated=row in TRUNCATED,
        )
        for row, length in enumerate(LENGTHS)
    ]


def advantages(count: int = len(LENGTHS)) -> Tensor:
    return torch.arange(count, dtype=torch.float64) - 3.5


def packed(recipe: TrainRecipe, rollouts: list[Rollout], failed: Tensor | None = None) -> list[list[PackedBatch]]:
    """The micro-batches of every minibatch, with advantages."""
    values = advantages(len(rollouts))
    found = pack_minibatches(
        recipe.grpo,
        recipe.policy,
        PACKER,
        rollouts,
        torch.zeros(len(rollouts), dtype=torch.bool) if failed is None else failed,
        token_level_loss=recipe.loss_fn.token_level_loss,
        process_group=dist.group.WORLD,  # type: ignore[arg-type]
    )
    return [minibatch.with_advantages(values).micro_batches for minibatch in found]


def responses(batches: list[PackedBatch], field: str) -> list[Tensor]:
    """One field of every response, in the order of packing; the first response token says which rollout it is."""
    found = {}
    for batch in batches:
        ids = response_values(batch, batch.labels)
        for row, values in response_values(batch, getattr(batch, field)).items():
            found[int(ids[row][0])] = values
    return [found[row] for row in sorted(found)]


def members(batches: list[PackedBatch]) -> set[int]:
    return {int(ids[0]) for batch in batches for ids in response_values(batch, batch.labels).values()}


def loss_of(batches: list[PackedBatch]) -> float:
    """The policy's reduction, sum of weighted token losses over the count of tokens, of a loss that tells tokens apart.

    The loss of token t (from 0) of rollout r is ``10 r + t``.
    """
    total = count = 0.0
    for batch in batches:
        ids, weights = response_values(batch, batch.labels), response_values(batch, batch.token_weights)
        for row, weight in weights.items():
            total += float((weight.double() * (10 * int(ids[row][0]) + torch.arange(len(weight)))).sum())
        count += batch.num_tokens
    return total / count


def token_losses(rows: list[int]) -> list[Tensor]:
    return [10.0 * row + torch.arange(LENGTHS[row], dtype=torch.float64) for row in rows]


def test_every_field_of_a_rollout_reaches_its_response_tokens(recipe: MakeRecipe) -> None:
    (batches,) = packed(recipe(), rollouts())
    assert len(batches) > 1, "one row would not show that rows are told apart"
    assert all(len(batch.tokens) <= 24 for batch in batches)
    for row, length in enumerate(LENGTHS):
        assert responses(batches, "labels")[row].tolist() == [row] * length
        assert responses(batches, "advantages")[row].tolist() == [row - 3.5] * length
        assert responses(batches, "behaviour_logprobs")[row].tolist() == pytest.approx([-row / 10] * length)
        assert responses(batches, "task_ids")[row].tolist() == [row // SAMPLES % 2] * length
    assert sum(batch.num_tokens for batch in batches) == sum(LENGTHS)


def test_a_minibatch_is_consecutive_rollouts_of_the_global_batch(recipe: MakeRecipe) -> None:
    small = recipe("policy.train_global_batch_size=4")
    whole = [members(batches) for batches in packed(small, rollouts())]
    assert whole == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    # A data-parallel rank that owns groups 1 and 3 contributes its rows to the same minibatches.
    own = [rollout for rollout in rollouts() if rollout.group_id in (1, 3)]
    part = [members(batches) for batches in packed(small, own)]
    assert part == [{2, 3}, {6, 7}]
    # One that owns group 0 alone has an empty row in the second.
    alone = packed(small, rollouts()[:2])
    assert [members(batches) for batches in alone] == [{0, 1}, set()]
    assert [sum(batch.num_tokens for batch in batches) for batches in alone] == [6, 0]


def test_token_level_loss_is_the_mean_over_all_tokens(recipe: MakeRecipe) -> None:
    (batches,) = packed(recipe(), rollouts())
    expected = torch.cat(token_losses(list(range(8)))).mean()
    # Weights of 1: float64 sums of small integers.
    assert loss_of(batches) == pytest.approx(float(expected), rel=1e-12)


def test_sequence_weights_give_the_mean_over_sequences_of_token_means(recipe: MakeRecipe) -> None:
    (batches,) = packed(recipe("loss_fn.token_level_loss=false"), rollouts())
    expected = torch.stack([losses.mean() for losses in token_losses(list(range(8)))]).mean()
    # The weights are float32.
    assert loss_of(batches) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("token_level", [True, False])
def test_a_masked_overlong_response_is_in_no_mean(recipe: MakeRecipe, token_level: bool) -> None:
    options = ["grpo.overlong=mask", f"loss_fn.token_level_loss={str(token_level).lower()}"]
    (batches,) = packed(recipe(*options), rollouts())
    losses = token_losses([row for row in range(8) if row not in TRUNCATED])
    means = torch.stack([values.mean() for values in losses])
    assert loss_of(batches) == pytest.approx(float(torch.cat(losses).mean() if token_level else means.mean()), rel=1e-6)
    assert members(batches) == set(range(8)), "it is still measured"
    for row in range(8):
        counted = 0.0 if row in TRUNCATED else 1.0
        assert responses(batches, "loss_mask")[row].tolist() == [counted] * LENGTHS[row]

    (kept,) = packed(recipe(), rollouts())
    assert sum(batch.num_tokens for batch in kept) == sum(LENGTHS)


@pytest.mark.parametrize("token_level", [True, False])
def test_a_rollout_without_a_reward_is_in_no_mean(recipe: MakeRecipe, token_level: bool) -> None:
    """The loss is that of the other rollouts alone, whichever mean it is."""
    options = ["grpo.overlong=mask", f"loss_fn.token_level_loss={str(token_level).lower()}"]
    failed = torch.zeros(len(LENGTHS), dtype=torch.bool)
    failed[[0, 6]] = True
    (batches,) = packed(recipe(*options), rollouts(), failed)
    losses = token_losses([row for row in range(8) if row not in TRUNCATED and row not in (0, 6)])
    means = torch.stack([values.mean() for values in losses])
    assert loss_of(batches) == pytest.approx(float(torch.cat(losses).mean() if token_level else means.mean()), rel=1e-6)
    assert sum(batch.num_tokens for batch in batches) == sum(map(len, losses))


def test_sequence_weights_count_the_sequences_of_every_rank(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one after the other: the mean over sequences is of the global minibatch, not of a rank's part."""
    everything, elsewhere = rollouts(), list[int]()

    def add_the_other_rank(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *, group: Any) -> None:
        if op == dist.ReduceOp.SUM:
            tensor += torch.tensor([sum(LENGTHS[row] for row in elsewhere), len(elsewhere)], dtype=tensor.dtype)

    monkeypatch.setattr(minibatches, "all_reduce", add_the_other_rank)
    batches = []
    for mine in ([0, 1, 4, 5], [2, 3, 6, 7]):
        own = [everything[row] for row in mine]
        elsewhere[:] = [row for row in range(8) if row not in mine]
        batches += packed(recipe("loss_fn.token_level_loss=false"), own)[0]
    expected = torch.stack([losses.mean() for losses in token_losses(list(range(8)))]).mean()
    assert loss_of(batches) == pytest.approx(float(expected), rel=1e-6)


def test_ranks_own_every_prompt_once() -> None:
    for size, ranks in ((6, 1), (6, 4), (2, 3)):
        owned = [owned_prompts(size, rank, ranks) for rank in range(ranks)]
        assert sorted(number for numbers in owned for number in numbers) == list(range(size))
