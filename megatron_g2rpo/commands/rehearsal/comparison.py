# SPDX-License-Identifier: Apache-2.0
"""Holds what a rehearsal counted against what the plan says of the same rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_g2rpo.commands.rehearsal.stage import StageRehearsal
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.wire import OPTIMIZER_STEP, stage_traffic
from megatron_g2rpo.recipe import TrainRecipe

# What a plan leaves out of its traffic: counts, metrics, a few numbers a token or a rank.
SMALL_BYTES = 10_000_000


@dataclass(frozen=True)
class Figure:
    """One figure of a plan beside the counted one, both in bytes.

    Attributes:
        name: what it is.
        planned, counted: the plan's figure and the rehearsal's.
        more, less: shares of the counted figure by which the planned one may lie above and below it.
    """

    name: str
    planned: int
    counted: int
    more: float
    less: float

    @property
    def deviation(self) -> float:
        """Share of the counted figure by which the planned one lies above it; infinite where nothing was counted."""
        if self.planned == self.counted:
            return 0.0
        return (self.planned - self.counted) / self.counted if self.counted else float("inf")

    @property
    def agrees(self) -> bool:
        """Whether the deviation is within the stated shares."""
        return -self.less <= self.deviation <= self.more


def memory_figures(plan: Plan, stage: StageRehearsal) -> list[Figure]:
    """Return the plan's figures of a stage's memory beside the counted ones.

    Weights and gradients are exact. Optimizer state: the plan takes the largest slice of any data-parallel rank. Kept
    activations: it takes the largest share of images, placeholders and labels, which different ranks may have. The peak
    of forward and backward pass is an upper bound in the plan.
    """
    planned = plan.stages[stage.stage]
    return [
        Figure("weights", planned.state.weights, stage.weights, 0.0, 0.0),
        Figure("gradients", planned.state.gradients, stage.gradients, 0.0, 0.0),
        Figure("optimizer state", planned.state.optimizer, stage.optimizer, 0.01, 0.0),
        Figure("activations in flight", planned.activations, stage.activations, 0.05, 0.01),
        # Nothing is generated in a rehearsal: no graphs are kept of it.
        Figure("update at its peak", planned.phases["update"] - planned.vision_graphs, stage.peak, 0.40, 0.0),
    ]


def traffic_figures(plan: Plan, stage: StageRehearsal) -> list[Figure]:
    """Return the bytes that a rank of a stage sends in the rehearsed micro-batches, by collective and group."""
    row = plan.batches.row
    count = stage.micro_batches
    batches = replace(plan.batches, count=count, tokens=count * row.tokens, images=count * len(row.images))
    planned: dict[tuple[str, str], int] = {}
    passes = int(isinstance(plan.recipe, TrainRecipe))  # a rehearsal has one, whatever the recipe needs
    for line in stage_traffic(plan.recipe, plan.model, plan.layout, batches, stage.stage, passes=passes):
        if line.per == OPTIMIZER_STEP:
            key = line.collective, line.group
            planned[key] = planned.get(key, 0) + line.sent
    counted = {(line.collective, line.group): line.sent for line in stage.traffic}
    return [
        Figure(
            f"{collective}, {group}",
            planned.get((collective, group), 0),
            counted.get((collective, group), 0),
            0.02,
            0.02,
        )
        for collective, group in sorted({*planned, *counted})
    ]


def deviations(plan: Plan, stages: list[StageRehearsal]) -> Iterator[str]:
    """Iterate over sentences, one for each figure that lies further from the counted one than is stated."""
    for stage in stages:
        figures = [
            *memory_figures(plan, stage),
            *(f for f in traffic_figures(plan, stage) if abs(f.planned - f.counted) > SMALL_BYTES),
        ]
        for figure in figures:
            if not figure.agrees:
                yield (
                    f"stage {stage.stage}, {figure.name}: planned {figure.planned:,} bytes, counted {figure.counted:,} "
                    f"({figure.deviation:+.1%}; allowed -{figure.less:.0%} to +{figure.more:.0%})"
                )
