# SPDX-License-Identifier: Apache-2.0
"""``env``: the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_g2rpo.recipe.base import Section, Text, ascending


class Trapezoid(Section):
    """``env.tasks.<task>.length``: 0 up to ``start``, 1 from ``peak_start`` to ``peak_end``, 0 from ``end``; tokens."""

    start: NonNegativeInt
    """Response tokens up to which the reward is 0."""
    peak_start: NonNegativeInt
    """Response tokens from which the reward is 1."""
    peak_end: NonNegativeInt
    """Response tokens up to which the reward is 1."""
    end: NonNegativeInt
    """Response tokens from which the reward is 0."""

    @model_validator(mode="after")
    def _order(self) -> Trapezoid:
        ascending(self, ["start", "peak_start", "peak_end", "end"])
        return self


class EntropyBounds(Section):
    """``env.tasks.<task>.entropy``: bounds that the task's mean token entropy is kept in."""

    low: NonNegativeFloat
    """Nats below which the loss pulls the entropy up."""
    high: NonNegativeFloat
    """Nats above which the loss pulls the entropy down."""

    @model_validator(mode="after")
    def _order(self) -> EntropyBounds:
        ascending(self, ["low", "high"])
        return self


class Task(Section):
    """``env.tasks.<task>``: how one task is rewarded and shaped. What it leaves out is ``env.default_task``'s."""

    answer_format: Text | None
    """How its answers are compared; null: as each sample says."""
    response_format: Text | None
    """How its responses are laid out; null: ``data.response_format``."""
    length: Trapezoid | None
    """Length reward; null: none."""
    entropy: EntropyBounds | None
    """Entropy bounds; null: not shaped."""
    reward_weights: Mapping[Text, NonNegativeFloat]
    """Part of the reward -> weight, where it is another than ``env.reward_weights`` says."""


class Env(Section):
    """``env``: the rewards."""

    reward_weights: Annotated[Mapping[Text, NonNegativeFloat], Field(min_length=1)]
    """Part of the reward -> weight. Parts are added up in this order; one of weight 0 is a metric only."""
    default_task: Task
    """What a task has that its own mapping does not say."""
    tasks: Mapping[str, Task]
    """Every task that occurs in the data."""

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        if not tasks:
            raise PydanticCustomError(
                "no_tasks", "lists no task: write down those of your data under env.tasks (`my_task: {}` is enough)"
            )
        return tasks


def complete_tasks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in which each task of ``env.tasks`` has what it leaves out from ``env.default_task``.

    Mappings merge key by key, everything else replaces; a task that is null says nothing. What is no mapping where
    there should be one is left as it is, for validation to name.

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
    """``top`` over ``base``."""
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return {**base, **{key: _over(base.get(key), value) for key, value in top.items()}}
