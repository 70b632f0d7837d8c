# SPDX-License-Identifier: Apache-2.0
"""Shows a rehearsal to people (tables) and to programs (a tree for JSON). GB is 10^9 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.commands.rehearsal.comparison import Figure, deviations, memory_figures, traffic_figures
from megatron_g2rpo.commands.rehearsal.stage import StageRehearsal
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.recipe import MegatronConfig, Recipe

GB = 1e9
_COUNTED = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer state": "optimizer",
    "activations in flight": "activations",
    "update at its peak": "peak",
}


def tables(recipe: Recipe, plan: Plan, stages: list[StageRehearsal]) -> RenderableType:
    """Return a rehearsal as tables and text.

    Args:
        recipe: the recipe.
        plan: the recipe's plan for the local modules, which are what is rehearsed.
        stages: the stages that were rehearsed.
    """
    return Group(
        Text(), _memory(plan, stages), Text(), *_messages(stages), Text(), Text("\n".join(_said(recipe, plan, stages)))
    )


def tree(recipe: Recipe, plan: Plan, stages: list[StageRehearsal]) -> dict[str, Any]:
    """Return a rehearsal in bytes, for JSON; the arguments are those of ``tables``."""

    def figures(found: list[Figure]) -> dict[str, Any]:
        return {f.name: {"planned": f.planned, "counted": f.counted, "deviation": f.deviation} for f in found}

    counted = [asdict(stage) for stage in stages]
    for entry, stage in zip(counted, stages, strict=True):
        entry["against_plan"] = figures([*memory_figures(plan, stage), *traffic_figures(plan, stage)])
    return {
        "stages": counted,
        "deviations": list(deviations(plan, stages)),
        "not_rehearsed": list(_not_rehearsed(recipe.policy.megatron_cfg)),
    }


def _memory(plan: Plan, stages: list[StageRehearsal]) -> Table:
    table = Table(title="Rehearsal: memory of a rank, GB", title_justify="left", title_style="bold")
    table.add_column("")
    for stage in stages:
        table.add_column(f"stage {stage.stage}\ncounted", justify="right")
        table.add_column("\nplanned", justify="right")
    planned = [{f.name: f for f in memory_figures(plan, stage)} for stage in stages]
    for name, field in _COUNTED.items():
        cells = []
        for index, stage in enumerate(stages):
            cells.append(_gb(getattr(stage, field)))
            figure = planned[index][name]
            cells.append(Text(_gb(figure.planned), style="" if figure.agrees else "bold red"))
        table.add_row(name, *cells)
    return table


def _messages(stages: list[StageRehearsal]) -> Iterator[RenderableType]:
    keys = sorted({(line.collective, line.group) for stage in stages for line in stage.traffic})
    if not keys:
        yield Text("Nothing travels: there is one process.")
        return
    count = stages[0].micro_batches
    title = f"Rehearsal: messages of a rank in an optimizer step of {count} micro-batch{'es' if count > 1 else ''}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("collective", "ranks"):
        table.add_column(name)
    for stage in stages:
        table.add_column(f"stage {stage.stage}\nnumber", justify="right")
        table.add_column("\nGB sent", justify="right")
    for key in keys:
        cells = []
        for stage in stages:
            line = next((line for line in stage.traffic if (line.collective, line.group) == key), None)
            cells += ["-", "-"] if line is None else [f"{line.count:,}", _gb(line.sent)]
        table.add_row(*key, *cells)
    yield table


def _said(recipe: Recipe, plan: Plan, stages: list[StageRehearsal]) -> Iterator[str]:
    ranks = ", ".join(f"{stage.rank} (stage {stage.stage})" for stage in stages)
    seconds = sum(stage.seconds for stage in stages)
    yield (
        f"Rehearsed on the CPU in {seconds:.0f} s, without weights: rank {ranks} of {recipe.world_size}, "
        f"{stages[0].micro_batches} full row(s) forward and backward and the optimizer step, on the local layers."
    )
    yield from _not_rehearsed(recipe.policy.megatron_cfg)
    found = list(deviations(plan, stages))
    yield from (f"Deviates: {sentence}" for sentence in found)
    if not found:
        yield "Every figure of the plan is within its stated share of what was counted (docs/plan.md)."


def _not_rehearsed(megatron: MegatronConfig) -> Iterator[str]:
    """Iterate over sentences on what the recipe would run on a GPU in place of what was rehearsed."""
    if megatron.transformer_impl != "local":
        yield (
            f"Not rehearsed: on a GPU transformer_impl={megatron.transformer_impl} takes Transformer Engine's layers, "
            "which have the norms in the linears after them and keep less for the backward pass."
        )
    if megatron.core_attention != "local":
        sends = f" and sends by cp_comm_type={megatron.cp_comm_type}" if megatron.context_parallel_size > 1 else ""
        yield (
            f"Not rehearsed: on a GPU core_attention={megatron.core_attention} takes Transformer Engine's attention, "
            f"which pads nothing{sends}."
        )
    if megatron.fp8_cfg.enabled:
        yield (
            "Not rehearsed: FP8. Rows are padded for it; weights, activations and their messages are counted in "
            "policy.precision."
        )
    for key in ("apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion"):
        if getattr(megatron, key):
            yield f"Not rehearsed: {key}; the parts are counted one by one."


def _gb(size: float) -> str:
    return f"{size / GB:,.3f}" if size else "-"
