# SPDX-License-Identifier: Apache-2.0
"""Claims: a step whose responses hold hardly an answer says so, with one of them."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.train.step.warnings import answer_warnings
from megatron_g2rpo.types import Rollout
from tests.unit.tasks.common import make_env, make_rollout, make_task

ENV = make_env({"accuracy": 1.0}, math=make_task(), ocr=make_task(response_format="boxed"))


@pytest.fixture(autouse=True)
def _world() -> None:
    init_process_group(select("cpu"))


def warnings(rollouts: list[Rollout]) -> list[str]:
    return answer_warnings(rollouts, ENV, "thinking_answer", dist.group.WORLD)


def of(answered: int, silent: int) -> list[Rollout]:
    return [make_rollout("<answer>12</answer>")] * answered + [make_rollout("It is\n12.")] * silent


def test_a_step_with_hardly_an_answer_shows_one_without() -> None:
    (line,) = warnings(of(4, 96))
    assert line.startswith(
        "warning: 4 of 100 responses hold an answer where the response format 'thinking_answer' has it; one of math "
        "without: 'It is\\n12.'."
    )
    for key in ("data.format_instruction", "data.response_format", "megatron-g2rpo sft"):
        assert key in line


def test_of_a_long_response_both_ends_are_shown() -> None:
    (line,) = warnings([make_rollout("start" + "x" * 10_000 + "end")])
    assert len(line) < 1200
    assert "'start" in line
    assert "end'" in line


@pytest.mark.parametrize(("answered", "silent"), [(5, 95), (1, 0), (0, 0)])
def test_other_steps_say_nothing(answered: int, silent: int) -> None:
    assert warnings(of(answered, silent)) == []


def test_the_task_s_own_format_is_named_and_the_prompt_s_part_of_the_response_is_shown() -> None:
    (line,) = warnings([make_rollout("12", task="ocr", prefix="<think>")])
    assert "'boxed'" in line
    assert "one of ocr without: '<think>12'" in line
