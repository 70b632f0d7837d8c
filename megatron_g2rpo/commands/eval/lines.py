# SPDX-License-Identifier: Apache-2.0
"""From rollouts to the lines of an evaluation: responses with their rewards, and prompts that could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_g2rpo.commands.eval.answers_file import Record
from megatron_g2rpo.recipe import Env, Recipe, TrainRecipe
from megatron_g2rpo.tasks.scoring import Scoring, failures_message, read
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.types import FailedReward, Response, Rewards, Rollout

# Why a prompt is not counted: a reward part failed, or the answer format does not read the reference.
REWARD, REFERENCE = "reward", "reference"
# Of a line with the reason REWARD: to how many of the responses.
FAILED = "failed_responses"
WAY_ON = "the last batch is not on file: mend the cause, or raise env.max_failed_rewards, and give the command again"


@dataclass(frozen=True)
class Lines:
    """What prompts gave, each known by its place in the batch.

    Attributes:
        answered: the lines of the responses to a prompt, in the order of the samples.
        unusable: the line of a prompt that could not be asked, or not be scored.
        failures: why responses have no reward; unreadable references aside, which are faults of samples.
    """

    answered: Mapping[int, list[Record]]
    unusable: Mapping[int, Record]
    failures: tuple[FailedReward, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Lines]) -> Lines:
        """Return the lines of several shares of a batch, in the order of the batch."""
        answered = {place: lines for part in parts for place, lines in part.answered.items()}
        unusable = {place: line for part in parts for place, line in part.unusable.items()}
        return cls(
            {place: answered[place] for place in sorted(answered)},
            {place: unusable[place] for place in sorted(unusable)},
            tuple(failure for part in parts for failure in part.failures),
        )


def scoring_of(recipe: Recipe, env: Env, workers: RewardWorkers | None) -> Scoring:
    """Return what scores the responses of a batch.

    Args:
        recipe: the recipe.
        env: its ``env`` section, with the metrics of an evaluation.
        workers: processes that reward parts run in; None: this process.
    """
    return Scoring(
        env,
        response_format=recipe.data.response_format,
        max_response_tokens=recipe.policy.generation.max_new_tokens,
        overlong_buffer=recipe.grpo.overlong_penalty.buffer if isinstance(recipe, TrainRecipe) else None,
        workers=workers,
        on_bad_sample="skip",
    )


def lines_of(rollouts: Sequence[Rollout], rewards: Rewards, env: Env, response_format: str) -> Lines:
    """Return the lines of responses. A prompt is counted with all its responses, or not at all.

    Args:
        rollouts: all responses to some prompts, whose ``group_id`` is the prompt's place in the batch.
        rewards: their rewards.
        env: the recipe's ``env`` section.
        response_format: name of the response format for tasks that name none.
    """
    rows: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows.setdefault(rollout.group_id, []).append(row)
    answered: dict[int, list[Record]] = {}
    unusable: dict[int, Record] = {}
    for place, members in rows.items():
        failures = [rewards.failures[row] for row in members if row in rewards.failures]
        if failures:
            unusable[place] = _unscored(rollouts[members[0]], failures)
        else:
            answered[place] = [_answered(rollouts[row], rewards, row, env, response_format) for row in members]
    return Lines(answered, unusable, tuple(each for each in rewards.failures.values() if not each.bad_sample))


def too_many(failures: Sequence[FailedReward], before: int, total: int, limit: float) -> str:
    """Return what is said where an evaluation ends, because too many responses have no reward.

    Args:
        failures: those of the last batch.
        before: number of responses before it that have no reward.
        total: number of responses of the whole evaluation.
        limit: the recipe's ``env.max_failed_rewards``.
    """
    failed = before + len(failures)
    what = f"{failed} of {total} rewards, more than env.max_failed_rewards ({limit:g}) allows,"
    return f"{failures_message(failures, what)}\n{WAY_ON}"


def _unscored(rollout: Rollout, failures: Sequence[FailedReward]) -> Record:
    sample = rollout.prompt.sample
    line: Record = {"key": sample.key, "task": sample.task, "reason": REFERENCE, "message": failures[0].message}
    return line if failures[0].bad_sample else {**line, "reason": REWARD, FAILED: len(failures)}


def _answered(rollout: Rollout, rewards: Rewards, row: int, env: Env, response_format: str) -> Record:
    sample, response = rollout.prompt.sample, read(rollout, env, response_format)
    assert isinstance(response, Response)  # a response that cannot be read has no reward
    return {
        "key": sample.key,
        "task": sample.task,
        "sample_index": rollout.sample_index,
        "question": sample.question,
        "reference": sample.answer,
        "answer_format": env.tasks[sample.task].answer_format or sample.answer_format,
        "answer": response.answer,
        "text": response.text,
        "thinking": response.thinking,
        "reward": float(rewards.total[row]),
        "parts": {name: float(part[row]) for name, part in rewards.parts.items()},
        "response_tokens": response.num_tokens,
        "truncated": response.truncated,
    }
