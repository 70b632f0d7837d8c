# SPDX-License-Identifier: Apache-2.0
"""Lines for the console where a step's rollouts say that a run is set up wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.tasks.scoring import read
from megatron_g2rpo.types import FailedReward, Rollout

# Share of responses with an answer below which there is hardly a reward to learn from.
FEW_ANSWERS = 0.05
# Characters of the response that is shown; of a longer one, both ends.
SHOWN_CHARACTERS = 600
# Steps in a row without signal after which it is said.
STEPS_WITHOUT_SIGNAL = 5


class SignalWatch:
    """Says when no group of a step has two different rewards, and warns after several such steps in a row."""

    def __init__(self) -> None:
        self._steps = 0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return a line for the console at the first step without signal in a row, and every ``STEPS_WITHOUT_SIGNAL``.

        Args:
            step: number of the step.
            metrics: metrics of a step.
        """
        self._steps = self._steps + 1 if metrics["train/zero_variance_groups"] >= 1.0 else 0
        if self._steps == 1:
            return [
                f"step {step}: all responses of every group have the same reward (mean "
                f"{metrics.get('train/reward', 0.0):.3g}): the rewards teach nothing"
            ]
        if self._steps == 0 or self._steps % STEPS_WITHOUT_SIGNAL:
            return []
        return [
            f"warning: in the last {self._steps} steps all responses of every group had the same reward (mean "
            f"{metrics.get('train/reward', 0.0):.3g}), so that the rewards teach nothing; look at responses and "
            "rewards, let prompts be easier or harder, sample more responses (grpo.num_generations_per_prompt), or "
            "draw other prompts for such groups (grpo.dynamic_sampling.enabled=true)"
        ]


def gap_warnings(limit: float, tasks: Sequence[str], metrics: Mapping[str, float]) -> Iterator[str]:
    """A line for each task whose mean gap between engine and trainer is above a limit.

    Args:
        limit: the recipe's ``policy.generation.gap_warning``, nats.
        tasks: task names.
        metrics: metrics of a step.
    """
    for task in tasks:
        gap = metrics.get(f"train/{task}/rollout_gap_mean", 0.0)
        if not gap <= limit:
            yield (
                f"warning: {task}: the rollout engine's log-probabilities are {gap:.3g} nats from the trainer's in the "
                f"mean (policy.generation.gap_warning: {limit:g}); `megatron-g2rpo doctor --rollout RECIPE` shows where"
            )


def answer_warnings(
    rollouts: Sequence[Rollout], env: Env, response_format: str, process_group: dist.ProcessGroup | None
) -> list[str]:
    """A line, with one response, where fewer than ``FEW_ANSWERS`` of the responses hold an answer. A collective.

    Args:
        rollouts: this rank's rollouts.
        env: the recipe's section, whose tasks may name a response format.
        response_format: response format of the tasks that name none.
        process_group: the ranks over which the responses are spread; None for all.
    """
    responses = [(rollout, read(rollout, env, response_format)) for rollout in rollouts]
    without = [rollout for rollout, read_ in responses if isinstance(read_, FailedReward) or read_.answer is None]
    counts = torch.tensor([len(rollouts) - len(without), len(rollouts)])
    all_reduce(counts, group=process_group)
    answered, count = counts.tolist()
    if answered >= FEW_ANSWERS * count:
        return []
    examples: list[tuple[str, str] | None] = [None] * dist.get_world_size(process_group)
    mine = [(rollout.prompt.task, rollout.prompt.response_prefix + rollout.text) for rollout in without[:1]]
    dist.all_gather_object(examples, mine[0] if mine else None, group=process_group)
    task, text = next(example for example in examples if example is not None)
    name = env.tasks[task].response_format or response_format
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} [...] {text[-SHOWN_CHARACTERS // 2 :]}"
    return [
        f"warning: {answered} of {count} responses hold an answer where the response format {name!r} has it; one of "
        f"{task} without: {text!r}. Let the prompts ask for the format (data.format_instruction: true), choose the one "
        "that the model writes (data.response_format), or teach it with `megatron-g2rpo sft`"
    ]
