# SPDX-License-Identifier: Apache-2.0
"""Rewards of rollouts: every part that the recipe weighs, kept apart and combined once.

``total = sum over parts of weight * part``, added up in the order of ``env.reward_weights``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.reward_parts import PartSettings
from megatron_g2rpo.types import Response, Rewards, Rollout, Sample

ACCURACY, OVERLONG = "accuracy", "overlong"


class RewardError(RuntimeError):
    """A reward could not be computed: the function raised, or returned no finite number. Names sample, task, function.

    Never turned into a reward of 0: that would be a signal to learn from.
    """


@dataclass(frozen=True)
class _Scored:
    """A rollout as its parts see it, and the weights of the parts that its task has."""

    sample: Sample
    response: Response
    settings: PartSettings
    weights: Mapping[str, float]


def score(
    rollouts: Sequence[Rollout],
    env: Env,
    *,
    response_format: str,
    max_response_tokens: int,
    overlong_buffer: int | None = None,
    overlong_weight: float | None = None,
) -> Rewards:
    """Rewards of every rollout.

    Args:
        rollouts: N responses, in any order.
        env: the recipe's ``env`` section.
        response_format: of tasks that name none.
        max_response_tokens: most tokens that a response can have.
        overlong_buffer: tokens before that limit over which the part ``overlong`` falls; None where there is none.
        overlong_weight: adds the part ``overlong``, last, with this weight; None: only where ``env`` weighs it.

    Returns:
        Every part that the recipe weighs, also with 0, unweighted. A part that only some tasks name is computed for
        their samples, and is 0 with weight 0 for the others.

    Raises:
        RewardError: a task that ``env.tasks`` lacks, a part or a response format that raises, or a part that is not
            finite.
        ValueError: a part that nobody registered.
    """
    added = {} if overlong_weight is None else {OVERLONG: overlong_weight}
    settings = {
        name: PartSettings(
            answer_format=task.answer_format,
            length=task.length,
            max_response_tokens=max_response_tokens,
            overlong_buffer=overlong_buffer,
        )
        for name, task in env.tasks.items()
    }
    weights_of = {name: {**env.reward_weights, **task.reward_weights, **added} for name, task in env.tasks.items()}
    rows = []
    for rollout in rollouts:
        response, task = read(rollout, env, response_format), rollout.prompt.task
        rows.append(_Scored(rollout.prompt.sample, response, settings[task], weights_of[task]))
    rewards = Rewards.none(len(rows))
    # In this order everywhere, so that the sum rounds alike on every rank.
    named = [env.reward_weights, *(task.reward_weights for task in env.tasks.values()), added]
    for name in dict.fromkeys(name for weights in named for name in weights):
        having = [index for index, row in enumerate(rows) if name in row.weights]
        part, weights = torch.zeros_like(rewards.total), torch.zeros_like(rewards.total)
        part[having] = torch.tensor(_values(name, [rows[index] for index in having]), dtype=torch.float64)
        weights[having] = torch.tensor([rows[index].weights[name] for index in having], dtype=torch.float64)
        rewards = rewards.plus(name, part, weights)
    return rewards


def read(rollout: Rollout, env: Env, response_format: str) -> Response:
    """A rollout's response, read in the format of its task.

    Args:
        rollout: the response.
        env: the recipe's ``env`` section.
        response_format: of tasks that name none.

    Raises:
        RewardError: a task that ``env.tasks`` lacks, or a response format that raises.
    """
    sample = rollout.prompt.sample
    if sample.task not in env.tasks:
        raise RewardError(f"sample {sample.key}: task {sample.task!r} is not listed under env.tasks; add it there")
    name = env.tasks[sample.task].response_format or response_format
    try:
        return response_formats.get(name).read(rollout)
    except Exception as error:  # a user's format may raise anything; it is re-raised with its place
        where = f"response format {name!r} of sample {sample.key}, task {sample.task!r}, response"
        raise RewardError(f"{where} {rollout.sample_index}: raised {type(error).__name__}: {error}") from error


def _values(name: str, rows: Sequence[_Scored]) -> list[float]:
    """The part of each row, checked."""
    entry = registry.reward_parts.entry(name)
    takes_settings = registry.reward_parts.takes(name, "settings")
    if not entry.facts.get("batched", False):
        return [_one(name, entry.value, row, takes_settings) for row in rows]
    if not rows:
        return []
    settings = {"settings": [row.settings for row in rows]} if takes_settings else {}
    where = f"reward {name} of {len(rows)} samples, the first of which is {rows[0].sample.key}"
    values = _called(
        lambda: list(entry.value([row.sample for row in rows], [row.response for row in rows], **settings)), where
    )
    if len(values) != len(rows):
        raise RewardError(f"{where}: returned {len(values)} numbers")
    return [_finite(value, _place(name, row)) for value, row in zip(values, rows, strict=True)]


def _one(name: str, function: Callable[..., Any], row: _Scored, takes_settings: bool) -> float:
    settings = {"settings": row.settings} if takes_settings else {}
    where = _place(name, row)
    return _finite(_called(lambda: function(row.sample, row.response, **settings), where), where)


def _place(name: str, row: _Scored) -> str:
    part = f"{name} {row.settings.answer_format_of(row.sample)!r}" if name == ACCURACY else name
    sample = row.sample
    return f"reward {part} of sample {sample.key}, task {sample.task!r}, response {row.response.sample_index}"


def _called(function: Callable[[], Any], where: str) -> Any:
    try:
        return function()
    except Exception as error:  # a registered part may raise anything; it is re-raised with its place
        raise RewardError(f"{where}: raised {type(error).__name__}: {error}") from error


def _finite(value: Any, where: str) -> float:
    number = _called(lambda: float(value), where)
    if not math.isfinite(number):
        raise RewardError(f"{where}: returned {number}, which is not a finite number")
    return number
