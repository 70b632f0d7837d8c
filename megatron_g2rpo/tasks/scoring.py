# SPDX-License-Identifier: Apache-2.0
"""Rewards of rollouts: the value of every part that the recipe weighs, and their weighted sum.

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
    """A reward could not be computed: the function raised, or returned no finite number.

    The message names sample, task and function. The error is never turned into a reward of 0, because the policy would
    learn from that.
    """


@dataclass(frozen=True)
class _Scored:
    """A rollout in the form that reward parts take, and the weights that its task gives to the parts."""

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
    """Compute the rewards of all rollouts.

    Args:
        rollouts: N rollouts, in any order.
        env: the recipe's ``env`` section.
        response_format: name of the response format for tasks that name none.
        max_response_tokens: largest number of tokens that a response can have.
        overlong_buffer: number of tokens before that limit over which the part ``overlong`` falls; None where the
            recipe has none.
        overlong_weight: weight of the part ``overlong``, which is then added last; None: it is a part only where
            ``env`` weighs it.

    Returns:
        The unweighted value of every part that the recipe weighs, those of weight 0 included, with their weighted sum.
        A part that only some tasks name is computed for their samples, and is 0 with weight 0 for all others.

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
    scored = []
    for rollout in rollouts:
        response, task = read(rollout, env, response_format), rollout.prompt.task
        scored.append(_Scored(rollout.prompt.sample, response, settings[task], weights_of[task]))
    rewards = Rewards.none(len(scored))
    # In this order everywhere, so that the sum rounds alike on every rank.
    named = [env.reward_weights, *(task.reward_weights for task in env.tasks.values()), added]
    for name in dict.fromkeys(name for weights in named for name in weights):
        having = [index for index, each in enumerate(scored) if name in each.weights]
        part, weights = torch.zeros_like(rewards.total), torch.zeros_like(rewards.total)
        part[having] = torch.tensor(_values(name, [scored[index] for index in having]), dtype=torch.float64)
        weights[having] = torch.tensor([scored[index].weights[name] for index in having], dtype=torch.float64)
        rewards = rewards.plus(name, part, weights)
    return rewards


def read(rollout: Rollout, env: Env, response_format: str) -> Response:
    """Read a rollout's response in the response format of its task.

    Args:
        rollout: the rollout to read.
        env: the recipe's ``env`` section.
        response_format: name of the response format for tasks that name none.

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


def _values(name: str, scored: Sequence[_Scored]) -> list[float]:
    """Compute a part for every rollout, and check that it is finite."""
    entry = registry.reward_parts.entry(name)
    takes_settings = registry.reward_parts.takes(name, "settings")
    if not entry.facts.get("batched", False):
        return [_one(name, entry.value, each, takes_settings) for each in scored]
    if not scored:
        return []
    settings = {"settings": [each.settings for each in scored]} if takes_settings else {}
    where = f"reward {name} of {len(scored)} samples, the first of which is {scored[0].sample.key}"
    returned = _called(
        lambda: entry.value([each.sample for each in scored], [each.response for each in scored], **settings), where
    )
    if isinstance(returned, str | bytes | Mapping):
        raise RewardError(f"{where}: returned {type(returned).__name__}, not a list of numbers")
    values = _called(lambda: list(returned), where)
    if len(values) != len(scored):
        raise RewardError(f"{where}: returned {len(values)} numbers")
    return [_finite(value, _place(name, each)) for value, each in zip(values, scored, strict=True)]


def _one(name: str, function: Callable[..., Any], scored: _Scored, takes_settings: bool) -> float:
    settings = {"settings": scored.settings} if takes_settings else {}
    where = _place(name, scored)
    return _finite(_called(lambda: function(scored.sample, scored.response, **settings), where), where)


def _place(name: str, scored: _Scored) -> str:
    part = f"{name} {scored.settings.answer_format_of(scored.sample)!r}" if name == ACCURACY else name
    sample = scored.sample
    return f"reward {part} of sample {sample.key}, task {sample.task!r}, response {scored.response.sample_index}"


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
