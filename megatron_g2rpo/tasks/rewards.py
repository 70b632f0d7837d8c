# SPDX-License-Identifier: Apache-2.0
"""Rewards of rollouts: accuracy, format, structure and length, kept apart and combined once.

``total = sum over parts of weight * part`` (design of the paper's public code: 0.9 accuracy, 0.1 format, and bonuses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from megatron_g2rpo.tasks.accuracy import get_accuracy
from megatron_g2rpo.tasks.parsing import find_answer, is_well_formed
from megatron_g2rpo.tasks.shaping import overlong_penalty, structure_bonus, trapezoid
from megatron_g2rpo.types import Rewards, Rollout

PARTS = ("accuracy", "format", "structure", "length")


class RewardWeights(Protocol):
    """What each part counts for in the total."""

    @property
    def accuracy(self) -> float: ...
    @property
    def format(self) -> float: ...
    @property
    def structure(self) -> float: ...
    @property
    def length(self) -> float: ...


class LengthBounds(Protocol):
    """Corners of the length trapezoid, in response tokens."""

    @property
    def start(self) -> float: ...
    @property
    def peak_start(self) -> float: ...
    @property
    def peak_end(self) -> float: ...
    @property
    def end(self) -> float: ...


class TaskSettings(Protocol):
    """One entry of ``env.tasks``: ``answer_format`` None means the sample's own, ``length`` None no length reward."""

    @property
    def answer_format(self) -> str | None: ...
    @property
    def length(self) -> LengthBounds | None: ...


class EnvSettings(Protocol):
    """The ``env`` section of a recipe."""

    @property
    def reward_weights(self) -> RewardWeights: ...
    @property
    def tasks(self) -> Mapping[str, TaskSettings]: ...


class RewardError(RuntimeError):
    """A reward could not be computed: the function raised, or returned no finite number. Names sample, task, function.

    Never turned into a reward of 0: that would be a signal to learn from.
    """


def score(rollouts: Sequence[Rollout], env: EnvSettings) -> Rewards:
    """Rewards of every rollout.

    Args:
        rollouts: N responses, in any order.
        env: the recipe's ``env`` section.

    Returns:
        ``parts`` with all of ``PARTS``, float64 ``[N]`` each and unweighted (0 where a part does not apply: structure
        of a sample without reference steps, length of a task without bounds), their ``weights``, and ``total``, the
        weighted sum.

    Raises:
        RewardError: a task that ``env.tasks`` lacks, a reward function that raises, or a reward that is not finite.
    """
    rows = [_score_one(rollout, env) for rollout in rollouts]
    parts = {
        name: torch.tensor([row[column] for row in rows], dtype=torch.float64) for column, name in enumerate(PARTS)
    }
    rewards = Rewards(parts={}, weights={}, total=torch.zeros(len(rows), dtype=torch.float64))
    for name in PARTS:  # in this order everywhere, so that the sum rounds alike on every rank
        rewards = rewards.plus(name, parts[name], getattr(env.reward_weights, name))
    return rewards


def penalise_overlong(
    rewards: Rewards, rollouts: Sequence[Rollout], *, limit: int, buffer: int, weight: float
) -> Rewards:
    """With the part ``overlong`` in [-1, 0], see ``shaping.overlong_penalty``.

    Args:
        rewards: of the rollouts.
        rollouts: N responses.
        limit: most response tokens.
        buffer: tokens before the limit over which the part falls from 0 to -1.
        weight: of the part.
    """
    part = [overlong_penalty(len(rollout.response_ids), limit, buffer) for rollout in rollouts]
    return rewards.plus("overlong", torch.tensor(part, dtype=torch.float64), weight)


def _score_one(rollout: Rollout, env: EnvSettings) -> tuple[float, ...]:
    sample = rollout.prompt.sample
    if sample.task not in env.tasks:
        raise RewardError(f"sample {sample.key}: task {sample.task!r} is not listed under env.tasks; add it there")
    settings = env.tasks[sample.task]
    bounds = settings.length

    def accuracy() -> float:
        answer = find_answer(rollout.text)
        function = get_accuracy(settings.answer_format or sample.answer_format)
        # Called without an answer, too: a broken reference must not hide behind malformed responses.
        value = function(answer if answer is not None else "", sample.answer)
        return value if answer is not None else 0.0

    def structure() -> float:
        if sample.reference_steps is None:
            return 0.0
        return structure_bonus(rollout.text, sample.reference_steps)

    def length() -> float:
        if bounds is None:
            return 0.0
        return trapezoid(len(rollout.response_ids), bounds.start, bounds.peak_start, bounds.peak_end, bounds.end)

    return (
        _checked(accuracy, f"accuracy {settings.answer_format or sample.answer_format!r}", rollout),
        _checked(lambda: float(is_well_formed(rollout.text)), "format", rollout),
        _checked(structure, "structure", rollout),
        _checked(length, "length", rollout),
    )


def _checked(compute: Callable[[], float], function: str, rollout: Rollout) -> float:
    sample = rollout.prompt.sample
    where = f"reward {function} of sample {sample.key}, task {sample.task!r}, response {rollout.sample_index}"
    try:
        value = float(compute())
    except Exception as error:  # a registered reward may raise anything; it is re-raised with its place
        raise RewardError(f"{where}: raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise RewardError(f"{where}: returned {value}, which is not a finite number")
    return value
