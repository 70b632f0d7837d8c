# SPDX-License-Identifier: Apache-2.0
"""``env``: the tasks, and how their responses are rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_g2rpo.recipe.base import Section, Text, ascending


class Trapezoid(Section):
    """``env.tasks.<task>.length``: corners of the length reward, in response tokens.

    The reward is 0 up to ``start``, rises to 1 at ``peak_start``, stays 1 to ``peak_end`` and falls to 0 at ``end``.
    """

    start: NonNegativeInt
    """Number of response tokens up to which the length reward is 0."""
    peak_start: NonNegativeInt
    """Number of response tokens from which the length reward is 1."""
    peak_end: NonNegativeInt
    """Number of response tokens up to which the length reward is 1."""
    end: NonNegativeInt
    """Number of response tokens from which the length reward is 0 again."""

    @model_validator(mode="after")
    def _order(self) -> Trapezoid:
        ascending(self, ["start", "peak_start", "peak_end", "end"])
        return self


class EntropyBounds(Section):
    """``env.tasks.<task>.entropy``: bounds between which entropy shaping keeps the task's mean token entropy."""

    low: NonNegativeFloat
    """Lower bound, nats: below it the loss pulls the entropy up."""
    high: NonNegativeFloat
    """Upper bound, nats: above it the loss pulls the entropy down."""

    @model_validator(mode="after")
    def _order(self) -> EntropyBounds:
        ascending(self, ["low", "high"])
        return self


class Task(Section):
    """``env.tasks.<task>``: how one task is rewarded and shaped; keys left out are taken from ``env.default_task``."""

    answer_format: Text | None
    """Name of the answer format that compares answers with the reference; null: the one that each sample names."""
    response_format: Text | None
    """Name of the response format of the task's responses; null: ``data.response_format``."""
    length: Trapezoid | None
    """Corners of the length reward; null: the task has no length reward."""
    entropy: EntropyBounds | None
    """Bounds of the task's mean token entropy; null: the entropy of the task is not shaped."""
    reward_weights: Mapping[Text, NonNegativeFloat]
    """Reward part -> weight for this task, where it differs from ``env.reward_weights``."""


class Env(Section):
    """``env``: the tasks, and how their responses are rewarded."""

    reward_weights: Annotated[Mapping[Text, NonNegativeFloat], Field(min_length=1)]
    """Reward part -> weight. Parts are added up in this order; a part of weight 0 is only logged."""
    reward_options: Mapping[Text, Mapping[str, Any]]
    """Reward part -> its options: the keyword-only parameters of its function."""
    reward_workers: NonNegativeInt
    """Number of processes, beside each training process that scores, that reward parts run in; 0: they run in the
    training process, where one that hangs or crashes takes the run with it."""
    reward_timeout_s: PositiveFloat
    """Seconds that one call of a reward part may take in a worker process, which is killed then."""
    reward_batch_timeout_s: PositiveFloat
    """Seconds that one call of a batched part may take, which is asked for all responses at once."""
    max_failed_rewards: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Share of a step's rollouts without a reward, because a part failed, above which the run ends."""
    default_task: Task
    """Settings of a task for the keys that its own mapping leaves out."""
    tasks: Mapping[str, Task]
    """Task -> its settings; every task that occurs in the data must be listed."""

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        if not tasks:
            raise PydanticCustomError(
                "no_tasks", "lists no task: write down those of your data under env.tasks (`my_task: {}` is enough)"
            )
        return tasks


def complete_tasks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with each task of ``env.tasks`` completed from ``env.default_task``.

    Mappings merge key by key; every other value replaces. A task that is null takes all of the default. A value that
    should be a mapping but is not stays as it is, so that validation names it.

    Args:
        tree: a recipe before validation; it is not changed.
    """
    env = tree.get("env")
    if not isinstance(env, dict):
        return dict(tree)
    default, tasks = env.get("default_task"), env.get("tasks")
    if not isinstance(default, dict) or not isinstance(tasks, dict):
        return dict(tree)
    completed = {task: _over(default, {} if own is None else own) for task, own in tasks.items()}
    return {**tree, "env": {**env, "tasks": completed}}


def _over(base: Any, top: Any) -> Any:
    """Merge ``top`` over ``base``: mappings key by key, while every other value of ``top`` replaces."""
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return {**base, **{key: _over(base.get(key), value) for key, value in top.items()}}
