# SPDX-License-Identifier: Apache-2.0
"""What a sample must hold is looked at where it is decoded, and each fault has its reason."""

from dataclasses import replace

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.checks import prompt_fits, reference_is_readable, response_fits, scored_formats
from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.stream import PromptStream
from tests.common.recipes import G2RPO


@pytest.fixture
def prompt(dataset, processor):
    return PromptStream(ShardIndex(dataset), {}, 0, processor).next_batch(1)[0]


def changed(prompt, **fields):
    return replace(prompt, sample=replace(prompt.sample, **fields))


def reason(check, prompt):
    with pytest.raises(SampleError) as raised:
        check(prompt)
    assert prompt.key in str(raised.value)
    return raised.value.reason


def test_a_prompt_that_leaves_no_room_is_named_with_what_to_change(prompt):
    length = len(prompt.inputs.token_ids)

    def check(room):
        policy = recipes.load(G2RPO, [], "train").policy
        return prompt_fits(
            policy.model_copy(update={"max_total_sequence_length": policy.generation.max_new_tokens + room})
        )

    check(length)(prompt)
    assert reason(check(length - 1), prompt) == "too_long"
    with pytest.raises(
        SampleError, match=rf"has {length} tokens, more than the {length - 1} .*data\.on_bad_sample=skip"
    ):
        check(length - 1)(prompt)


@pytest.mark.parametrize(
    ("answer_format", "reference"),
    [("numeric", "many"), ("box_iou", "[3, 1]"), ("multiple_choice", "Z9"), ("exact", " "), ("no_such_format", "5")],
)
def test_a_reference_that_its_format_cannot_read_is_refused(prompt, answer_format, reference):
    bad = changed(prompt, answer=reference, answer_format=answer_format)
    assert reason(reference_is_readable({prompt.task: None}), bad) == "reference"


@pytest.mark.parametrize("answer", [3, None, [1, 2]])
def test_a_reference_of_another_type_is_refused_and_no_crash(prompt, answer):
    assert reason(reference_is_readable({prompt.task: None}), changed(prompt, answer=answer)) == "reference"


def test_the_task_s_own_format_decides_and_unscored_tasks_are_not_read(prompt):
    bad = changed(prompt, answer="many", answer_format="numeric")
    reference_is_readable({prompt.task: "exact"})(bad)
    reference_is_readable({})(bad)
    assert reason(reference_is_readable({prompt.task: "numeric"}), changed(bad, answer_format="exact")) == "reference"


def test_tasks_without_accuracy_have_no_format_to_check():
    def formats(*overrides):
        return scored_formats(recipes.load(G2RPO, list(overrides), "train").env)

    assert formats("env.tasks.ocr.answer_format=exact")["ocr"] == "exact"
    none = "env.reward_weights={_override_: true, format: 1.0}"
    assert formats(none) == {}
    assert formats(none, "env.tasks.ocr.reward_weights={accuracy: 1.0}") == {"ocr": None}


def test_supervised_training_needs_a_response_that_fits(prompt, processor):
    response_fits(processor, 10_000)(prompt)
    assert reason(response_fits(processor, 10_000), changed(prompt, response=None)) == "response"
    assert reason(response_fits(processor, len(prompt.inputs.token_ids) + 2), prompt) == "too_long"
