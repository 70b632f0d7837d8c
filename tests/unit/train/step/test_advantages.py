# SPDX-License-Identifier: Apache-2.0
"""Claims: every estimator and surrogate that a recipe names gets its options, the reward's parts and its history."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_g2rpo.objective import History, Sequences, estimators, surrogates
from megatron_g2rpo.objective.reward_batch import as_reward_batch
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.step.advantages import Advantages, advantages_of
from megatron_g2rpo.types import FailedReward, ModelInputs, Prompt, Rewards, Rollout, Sample

MakeRecipe = Callable[..., TrainRecipe]


@pytest.fixture(autouse=True)
def _world() -> None:
    """A world of one."""
    init_process_group(select("cpu"))


def rollouts() -> list[Rollout]:
    """Four groups of three, of two tasks."""
    prompts = [
        Prompt(
            sample=Sample(key=f"s/{group}", task="ab"[group % 2], question="", answer="", answer_format="exact"),
            inputs=ModelInputs(
                token_ids=torch.arange(3),
                pixel_values=torch.zeros(0, 6),
                image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
            ),
            task_id=group % 2,
        )
        for group in range(4)
    ]
    return [
        Rollout(
            prompt=prompts[number // 3],
            group_id=number // 3,
            sample_index=number % 3,
            response_ids=torch.zeros(1, dtype=torch.int64),
            logprobs=torch.zeros(1),
            text="",
            truncated=False,
        )
        for number in range(12)
    ]


def rewards() -> Rewards:
    generator = torch.Generator().manual_seed(0)
    result = Rewards.none(12)
    for name, weight in (("accuracy", 0.9), ("format", 0.1), ("length", 0.0)):
        result = result.plus(name, torch.randint(4, (12,), generator=generator).double() / 4, weight)
    return result


def advantages(recipe: TrainRecipe, rewards: Rewards, history: History | None = None) -> Advantages:
    """The advantages of ``rollouts()`` with these rewards."""
    return advantages_of(
        recipe.grpo.adv_estimator,
        rollouts(),
        rewards,
        history=History() if history is None else history,
        process_group=dist.group.WORLD,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", estimators.names())
def test_every_estimator_runs_from_a_recipe(make_recipe: MakeRecipe, name: str) -> None:
    history = History()
    found = advantages(make_recipe(f"grpo.adv_estimator.name={name}"), rewards(), history)
    assert found.values.shape == (12,)
    assert float(found.values.abs().max()) > 0.1
    assert found.diagnostics.task.tolist() == [0, 1]
    by_task = [found.values[[i for i in range(12) if i // 3 % 2 == task]] for task in (0, 1)]
    expected = torch.stack([values.std(correction=0) for values in by_task])
    torch.testing.assert_close(found.diagnostics.std, expected, rtol=1e-12, atol=0)
    assert len(found.statistics.groups.id) == 4
    assert bool(history.moments) == (name == "ema_grpo")


def test_options_reach_the_estimator(make_recipe: MakeRecipe) -> None:
    def values(*options: str) -> torch.Tensor:
        overrides = [f"grpo.adv_estimator.{option}" for option in options]
        return advantages(make_recipe(*overrides), rewards()).values

    unit = values("variance=unit")
    assert float(unit[[0, 1, 2, 6, 7, 8]].std(correction=0)) == pytest.approx(1.0, rel=1e-12)
    assert not torch.equal(unit, values())
    floor = values("name=ema_grpo", "min_std=1e6")
    assert float(floor.abs().max()) < 1e-5
    batch, group = (values("name=reinforce_plus_plus", f"baseline={kind}") for kind in ("batch", "group"))
    assert not torch.equal(batch, group)


def test_parts_are_weighed_as_in_the_reward(make_recipe: MakeRecipe) -> None:
    """A part of weight 0 has no say; the weights of the others do."""
    recipe = make_recipe("grpo.adv_estimator.name=gdpo")
    plain = rewards()
    other = Rewards(
        parts={**plain.parts, "length": torch.arange(12, dtype=torch.float64)}, weights=plain.weights, total=plain.total
    )
    values = advantages(recipe, plain).values
    assert torch.equal(advantages(recipe, other).values, values)
    weights = {**plain.weights, "accuracy": plain.weights["format"], "format": plain.weights["accuracy"]}
    swapped = Rewards(parts=plain.parts, weights=weights, total=plain.total)
    assert not torch.allclose(advantages(recipe, swapped).values, values)


def without(rewards: Rewards, *rows: int) -> Rewards:
    """The rewards as if a part had failed for some rollouts."""
    total = rewards.total.clone()
    total[list(rows)] = torch.nan
    failures = {row: FailedReward(part="accuracy", message="") for row in rows}
    return Rewards(parts=rewards.parts, weights=rewards.weights, total=total, failures=failures)


@pytest.mark.parametrize("name", estimators.names())
def test_a_rollout_without_a_reward_is_in_no_group(make_recipe: MakeRecipe, name: str) -> None:
    """Against the estimator's own answer to a batch that never had it."""
    section = make_recipe(f"grpo.adv_estimator.name={name}").grpo.adv_estimator
    keep = [row for row in range(12) if row not in (1, 10)]
    plain, histories = rewards(), (History(), History())
    batch = as_reward_batch(
        plain.total[keep],
        torch.tensor([row // 3 for row in keep]),
        torch.tensor([row // 3 % 2 for row in keep]),
        {part: values[keep] for part, values in plain.parts.items()},
        {part: weights[keep] for part, weights in plain.weights.items()},
    )
    expected = section.bound()(batch, histories[0])
    found = advantages(make_recipe(f"grpo.adv_estimator.name={name}"), without(plain, 1, 10), histories[1])
    assert torch.equal(found.values[keep], expected)
    assert found.values[[1, 10]].tolist() == [0.0, 0.0]
    assert found.statistics.groups.count.tolist() == [2, 3, 3, 2]
    assert histories[0].state_dict() == histories[1].state_dict()


@pytest.mark.parametrize("name", estimators.names())
def test_a_group_with_too_few_rewards_has_no_signal(make_recipe: MakeRecipe, name: str) -> None:
    """Two of three failed: an estimator that compares within groups has nothing to compare; all three, no one has."""
    recipe = make_recipe(f"grpo.adv_estimator.name={name}")
    found = advantages(recipe, without(rewards(), 3, 4, 6, 7, 8))
    whole = [0, 1, 2, 9, 10, 11]
    alone = recipe.grpo.adv_estimator.min_group_size == 1
    assert found.statistics.groups.id.tolist() == ([0, 1, 3] if alone else [0, 3])
    assert found.values[[3, 4, 6, 7, 8]].tolist() == [0.0] * 5
    assert bool(found.values[5] != 0.0) == alone
    assert float(found.values[whole].abs().max()) > 0.1
    assert bool(found.values.isfinite().all())


def test_unknown_names_are_errors(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="unknown advantage estimator 'g2rop'"):
        make_recipe("grpo.adv_estimator.name=g2rop")
    with pytest.raises(ValueError, match="unknown surrogate 'pop'"):
        make_recipe("loss_fn.name=pop")


@pytest.mark.parametrize("name", surrogates.names())
def test_every_surrogate_runs_from_a_recipe(make_recipe: MakeRecipe, name: str) -> None:
    surrogate = make_recipe(f"loss_fn.name={name}").loss_fn.bound()
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    result = surrogate(
        logprobs,
        torch.tensor([-1.1, -1.9, -0.5]),
        torch.tensor([1.0, -1.0, 0.5]),
        Sequences(ids=torch.tensor([0, 0, 1]), size=2),
    )
    result.loss.sum().backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad.abs().min()) > 0.0
