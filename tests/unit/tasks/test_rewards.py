# SPDX-License-Identifier: Apache-2.0
"""Rewards are kept apart, combined once, and never invented where a function fails."""

from types import SimpleNamespace

import pytest
import torch
from megatron_g2rpo.tasks.rewards import PARTS, RewardError, score

from megatron_g2rpo.tasks import accuracy
from megatron_g2rpo.tasks.prompts import build_messages
from megatron_g2rpo.types import ModelInputs, Prompt, Rollout, Sample

WEIGHTS = SimpleNamespace(accuracy=0.9, format=0.1, structure=0.25, length=0.5)
BOUNDS = SimpleNamespace(start=0, peak_start=4, peak_end=8, end=16)


def make_env(answer_format=None, length=None):
    return SimpleNamespace(
        reward_weights=WEIGHTS, tasks={"math": SimpleNamespace(answer_format=answer_format, length=length)}
    )


def make_rollout(text, *, answer="12", answer_format="numeric", steps="7 + 5", task="math", num_tokens=4):
    sample = Sample(
        key="shard-000001/train-000007",
        task=task,
        question="What is the left digit plus the right digit?",
        answer=answer,
        answer_format=answer_format,
        reference_steps=steps,
    )
    nothing = ModelInputs(
        token_ids=torch.zeros(1, dtype=torch.int64),
        pixel_values=torch.zeros(0, 1),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
    )
    return Rollout(
        prompt=Prompt(sample=sample, inputs=nothing, task_id=0),
        group_id=0,
        sample_index=3,
        response_ids=torch.zeros(num_tokens, dtype=torch.int64),
        logprobs=torch.zeros(num_tokens),
        text=text,
        truncated=False,
    )


def test_parts_are_unweighted_and_the_total_is_their_weighted_sum():
    rollouts = [
        make_rollout("<thinking>7 + 5</thinking><answer>12</answer>", num_tokens=6),
        make_rollout("<thinking>7 - 5</thinking><answer>2</answer>", num_tokens=12),
        make_rollout("<answer>12</answer>", num_tokens=2),
        make_rollout("12", num_tokens=99),
    ]
    rewards = score(rollouts, make_env(length=BOUNDS))
    assert tuple(rewards.parts) == PARTS
    assert rewards.parts["accuracy"].tolist() == [1, 0, 1, 0]
    assert rewards.parts["format"].tolist() == [1, 1, 0, 0]
    assert rewards.parts["structure"].tolist() == [1, 2 / 3, 0, 0]
    assert rewards.parts["length"].tolist() == [1, 0.5, 0.5, 0]
    assert all(part.dtype == torch.float64 for part in (*rewards.parts.values(), rewards.total))
    # Four products and sums of numbers near 1 in float64.
    assert rewards.total.tolist() == pytest.approx([1.75, 0.1 + 0.25 * 2 / 3 + 0.25, 1.15, 0.0], abs=1e-15)


def test_a_part_that_does_not_apply_is_zero():
    text = "<thinking>7 + 5</thinking><answer>12</answer>"
    rewards = score([make_rollout(text, steps=None)], make_env(length=None))
    assert rewards.parts["structure"].tolist() == [0] == rewards.parts["length"].tolist()


def test_the_recipe_s_answer_format_overrides_the_sample_s():
    rollouts = [make_rollout("<answer>10</answer>", answer="20")]
    assert score(rollouts, make_env()).parts["accuracy"].item() == 0.0
    assert score(rollouts, make_env(answer_format="relative")).parts["accuracy"].item() == 0.5


def test_no_rollouts_give_no_rewards():
    rewards = score([], make_env())
    assert rewards.total.shape == (0,)
    assert all(part.shape == (0,) for part in rewards.parts.values())


def test_a_reward_that_raises_names_sample_task_and_function_and_keeps_the_cause(monkeypatch):
    def explodes(answer, reference):
        raise KeyError("no such thing")

    monkeypatch.setitem(accuracy._REGISTRY, "explodes", explodes)
    with pytest.raises(RewardError) as caught:
        score([make_rollout("<answer>1</answer>", answer_format="explodes")], make_env())
    for piece in (
        "shard-000001/train-000007",
        "'math'",
        "accuracy 'explodes'",
        "response 3",
        "KeyError",
        "no such thing",
    ):
        assert piece in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(monkeypatch, value):
    monkeypatch.setitem(accuracy._REGISTRY, "odd", lambda answer, reference: value)
    with pytest.raises(RewardError, match=r"accuracy 'odd' of sample shard-000001/train-000007.*not a finite number"):
        score([make_rollout("<answer>1</answer>", answer_format="odd")], make_env())


@pytest.mark.parametrize("text", ["<answer>12</answer>", "no answer at all"])
def test_a_broken_reference_is_an_error_whatever_the_response(text):
    with pytest.raises(RewardError, match=r"shard-000001/train-000007.*reference answer 'twelve' is not a number"):
        score([make_rollout(text, answer="twelve")], make_env())


def test_broken_reference_steps_are_an_error():
    with pytest.raises(RewardError, match=r"reward structure of sample shard-000001/train-000007"):
        score([make_rollout("<answer>12</answer>", steps="none")], make_env())


def test_an_unknown_answer_format_is_an_error_that_names_the_sample():
    with pytest.raises(RewardError, match=r"shard-000001/train-000007.*unknown answer format 'iou'"):
        score([make_rollout("<answer>12</answer>", answer_format="iou")], make_env())


def test_a_task_that_the_recipe_does_not_list_is_an_error():
    with pytest.raises(RewardError, match=r"shard-000001/train-000007: task 'ocr' is not listed under env.tasks"):
        score([make_rollout("x", task="ocr")], make_env())


def test_messages_put_the_system_prompt_first_and_images_before_the_question():
    sample = Sample(
        key="s/1", task="t", question="What?", answer="a", answer_format="exact", images=(object(), object())
    )
    user = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}
    assert build_messages(sample) == [user]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert build_messages(sample, "Be brief.") == [system, user]
