# SPDX-License-Identifier: Apache-2.0
"""Claims: each row of a record has what its own rollout was sampled, rewarded and trained with, and why it was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_g2rpo.data.packing import Packer
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.reading import read_step
from megatron_g2rpo.train.step.minibatches import Minibatch, pack_minibatches
from megatron_g2rpo.train.step.recording import Recording
from megatron_g2rpo.types import FailedReward, ModelInputs, Prompt, Rewards, Rollout, Sample

MakeRecipe = Callable[..., TrainRecipe]
PACKER = Packer(image_token_id=90, spatial_merge_size=2, pad_token_id=99)
LENGTHS = (1, 5, 3, 8, 2, 4, 7, 6)  # of the responses of four groups of two


@pytest.fixture(autouse=True)
def _world() -> None:
    """A world of one."""
    init_process_group(select("cpu"))


class Decoder:
    """What a recording asks of a processor."""

    def prompt_text(self, inputs: ModelInputs) -> str:
        return f"prompt of {inputs.token_ids.tolist()} \ud83d"


@dataclass
class Groups:
    """A layout of one rank."""

    model_rank: int = 0
    data_rank: int = 0
    data_size: int = 1


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> TrainRecipe:
    """Four prompts, two samples each, two updates; task `b` alone weighs the part `structure`."""
    return make_recipe(
        "grpo.num_prompts_per_step=4", "grpo.num_generations_per_prompt=2", "policy.train_global_batch_size=4",
        "policy.max_total_sequence_length=24", "policy.sequence_packing.train_mb_tokens=24",
        "policy.generation.max_new_tokens=8", "grpo.overlong=mask",
        "env.reward_weights={_override_: true, accuracy: 0.9}", "env.tasks._override_=true",
        "env.tasks.a={entropy: null}", "env.tasks.b={entropy: null, reward_weights: {structure: 0.5}}",
    )  # fmt: skip


def rollouts() -> list[Rollout]:
    prompts = []
    for group in range(4):
        inputs = ModelInputs(
            token_ids=torch.arange(5) + group,
            pixel_values=torch.zeros(0, 6),
            image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        )
        sample = Sample(key=f"s/{group}", task="ab"[group % 2], question="?", answer="1", answer_format="exact")
        prompts.append(Prompt(sample=sample, inputs=inputs, task_id=group % 2))
    return [
        Rollout(
            prompt=prompts[index // 2],
            group_id=index // 2,
            sample_index=index % 2,
            response_ids=torch.full((length,), index),
            logprobs=torch.full((length,), -float(index)),
            text=f"<thinking>x</thinking><answer>{index}</answer>" if index else "no format",
            truncated=index == 3,
            kept_ids=torch.tensor([[index, 50 + index, -1]] * length),
        )
        for index, length in enumerate(LENGTHS)
    ]


def rewards_of(rollouts: Sequence[Rollout]) -> Rewards:
    total = torch.arange(8, dtype=torch.float64)
    total[5] = torch.nan
    rewards = Rewards(parts={"accuracy": total / 2, "structure": total / 4}, weights={}, total=total)
    return replace(rewards, failures={5: FailedReward(part="accuracy", message="it raised")})


def with_logprobs(minibatch: Minibatch) -> Minibatch:
    """Old log-probabilities and entropies that say whose token they are; the sequence of rollout 7 is out of ratio."""
    batches, entropies = [], []
    for batch in minibatch.micro_batches:
        whose = -batch.behaviour_logprobs  # a rollout's number
        batches.append(replace(batch, old_logprobs=whose + 0.25, importance_weights=(whose != 7).float()))
        entropies.append(whose + 0.5)
    return replace(minibatch, micro_batches=batches, entropies=entropies)


def recorded(recipe: TrainRecipe, run: Path, *, finished: bool = True) -> list[dict[str, Any]]:
    answers = rollouts()
    rewards = rewards_of(answers)
    groups, processor = cast(ParallelGroups, Groups()), cast(ChatProcessor, Decoder())
    recording = Recording(recipe, groups, processor, print)
    recording.begin(3, answers, rewards, 1.5)
    if finished:
        minibatches = pack_minibatches(
            recipe.grpo, recipe.policy, PACKER, answers, rewards.failed,
            token_level_loss=True, process_group=cast(Any, None),
        )  # fmt: skip
        advantages = torch.arange(8, dtype=torch.float64) - 3.5
        recording.finish(rewards, advantages, [with_logprobs(each) for each in minibatches])
    return read_step(run, 3)[0].to_pylist()


def test_each_row_has_what_is_its_own(recipe: TrainRecipe, run: Path) -> None:
    rows = recorded(recipe, run)
    for index, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        assert (row["step"], row["weights_version"], row["engine"]) == (3, 2, "transformers")
        assert (row["group_id"], row["sample_index"], row["update"]) == (index // 2, index % 2, index // 4)
        assert row["prompt_key"] == f"s/{index // 2}"
        assert row["prompt_text"] == f"prompt of {list(range(index // 2, index // 2 + 5))} \ufffd"
        assert row["response_ids"] == [index] * length
        assert row["behaviour_logprobs"] == [-float(index)] * length
        assert row["kept_ids"] == [[index, 50 + index, -1]] * length
        assert row["old_logprobs"] == [index + 0.25] * length
        assert row["entropies"] == [index + 0.5] * length
        assert row["advantage"] == index - 3.5
        assert (row["answer"], row["well_formed"]) == ((str(index), True) if index else (None, False))


def test_rewards_that_are_not_there_are_null(recipe: TrainRecipe, run: Path) -> None:
    rows = recorded(recipe, run)
    assert [row["reward"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0, None, 6.0, 7.0]
    assert [row["reward_accuracy"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0, None, 3.0, 3.5]
    assert [row["reward_structure"] for row in rows] == [None, None, 0.5, 0.75, None, None, 1.5, 1.75], "task b alone"


def test_what_is_left_out_of_the_loss_says_why(recipe: TrainRecipe, run: Path) -> None:
    masked = [row["masked"] for row in recorded(recipe, run)]
    assert masked == [None, None, None, "overlong", None, "no reward", None, "ratio"]


def test_before_the_updates_all_is_there_that_a_replay_needs(recipe: TrainRecipe, run: Path) -> None:
    finished = recorded(recipe, run)
    begun = recorded(recipe, run, finished=False)
    later = {"advantage", "old_logprobs", "entropies"}
    for one, other in zip(begun, finished, strict=True):
        assert all(one[name] is None for name in later)
        assert {name: value for name, value in one.items() if name not in later | {"masked"}} == {
            name: value for name, value in other.items() if name not in later | {"masked"}
        }
