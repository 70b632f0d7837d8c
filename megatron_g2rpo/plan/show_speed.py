# SPDX-License-Identifier: Apache-2.0
"""Shows the estimated time of a step, and the layouts of a sweep, to people (tables) and to programs (trees)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.speed import Speed
from megatron_g2rpo.plan.sweep import Proposal

GB = 1e9
_SHOWN = 10
_PHASES = {
    "generation": "generation",
    "weights": "weights to the engines",
    "logprobs": "log-probabilities before the update",
    "update": "forward and backward passes",
    "messages": "messages beside them",
    "optimizer": "optimizer steps",
}


def table(speed: Speed, card: str) -> RenderableType:
    """Return the time of a step by phase, for a terminal.

    Args:
        speed: the estimate.
        card: name of the GPU.
    """
    title = f"Time of a step on {card}, seconds: an estimate from data sheets, not measured"
    shown = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    shown.add_column("")
    shown.add_column("", justify="right")
    for name, seconds in speed.phases.items():
        if seconds:
            shown.add_row(_PHASES[name], f"{seconds:,.2f}")
    shown.add_section()
    shown.add_row("together", f"{speed.step:,.1f}")
    shown.add_row("tokens a second of a GPU", f"{speed.rate:,.0f}")
    shown.add_row("model FLOPs utilisation of the update", f"{speed.mfu:.0%}")
    return shown


def tree(speed: Speed, card: str) -> dict[str, Any]:
    """Return the estimate in seconds, tokens and shares, for JSON; the arguments are those of ``table``."""
    return {
        "card": card,
        "phases": speed.phases,
        "step": speed.step,
        "tokens": speed.tokens,
        "gpus": speed.gpus,
        "tokens_per_second_per_gpu": speed.rate,
        "mfu": speed.mfu,
    }


def proposals(found: list[Proposal], gpus: int, card: str) -> RenderableType:
    """Return the best layouts of a sweep, for a terminal.

    Args:
        found: the layouts that fit, best first.
        gpus: number of GPUs.
        card: their name.
    """
    if not found:
        return Text(f"No layout fits {gpus} x {card}: take more or larger GPUs, or shorter rows.", style="red")
    title = f"Layouts for {gpus} x {card} that fit, fastest first ({len(found)} in all); times are estimates"
    # 80 columns hold it; what is narrower folds, and cuts nothing.
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("T x P x C x D", "recompute", "engine", "GB", "step s", "tok/s/GPU", "MFU"):
        shown.add_column(name, justify="left" if name in {"recompute", "engine"} else "right", overflow="fold")
    for proposal in found[:_SHOWN]:
        plan, layout, speed = proposal.plan, proposal.plan.layout, proposal.speed
        sizes = (layout.tensor, layout.pipeline, layout.context, plan.recipe.data_parallel_size)
        shown.add_row(
            " x ".join(str(size) for size in sizes),
            plan.recipe.policy.megatron_cfg.recompute_granularity or "-",
            _engine(plan, speed),
            f"{plan.worst.peak / GB:.1f}",
            f"{speed.step:,.1f}",
            f"{speed.rate:,.0f}",
            f"{speed.mfu:.0%}",
        )
    return Group(shown, *(Text(line) for line in _first(found[0])))


def proposal_trees(found: list[Proposal], card: str) -> list[dict[str, Any]]:
    """Return the layouts of a sweep, best first, for JSON."""
    return [
        {"overrides": list(each.overrides), "peak": each.plan.worst.peak, "speed": tree(each.speed, card)}
        for each in found
    ]


def _engine(plan: Plan, speed: Speed) -> str:
    generation = plan.recipe.policy.generation
    ranks, share = generation.vllm_cfg.tensor_parallel_size, generation.vllm_cfg.gpu_memory_utilization
    servers = speed.gpus - plan.recipe.world_size
    if servers:
        return f"servers: {servers // ranks} x {ranks}"
    return f"vllm: TP {ranks}, {share}" if speed.generation else "-"


def _first(proposal: Proposal) -> Iterator[str]:
    """Iterate over the lines that give the overrides of a layout: words of a shell, to be pasted as they are."""
    servers = any(override.partition("=")[0].endswith("addresses") for override in proposal.overrides)
    yield "The first as overrides" + (" (the names of the servers stand for yours):" if servers else ":")
    *others, last = map(shlex.quote, proposal.overrides)
    yield from (f"  {override} \\" for override in others)
    yield f"  {last}"
