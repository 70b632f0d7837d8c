# SPDX-License-Identifier: Apache-2.0
"""``env``: the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

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
    """``env.tasks.<task>``: how one task is rewarded and shaped."""

    answer_format: Text | None
    """Accuracy reward for every sample of the task; null: the one that each sample names."""
    length: Trapezoid | None
    """Length reward; null: none."""
    entropy: EntropyBounds | None
    """Entropy bounds; null: not shaped."""


class RewardWeights(Section):
    """``env.reward_weights``: weights of the reward's parts, each of which lies in [0, 1]."""

    accuracy: NonNegativeFloat
    """Weight of the answer's accuracy."""
    format: NonNegativeFloat
    """Weight of ``<thinking>...</thinking><answer>...</answer>``."""
    structure: NonNegativeFloat
    """Weight of the structure bonus inside the answer."""
    length: NonNegativeFloat
    """Weight of the length reward."""


class Env(Section):
    """``env``: the rewards."""

    reward_weights: RewardWeights
    """How the parts are combined, once."""
    tasks: Annotated[Mapping[str, Task], Field(min_length=1)]
    """Every task that occurs in the data."""


def complete_tasks(tree: dict) -> None:
    """Placeholder until merged."""
