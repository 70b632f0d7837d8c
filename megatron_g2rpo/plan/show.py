# SPDX-License-Identifier: Apache-2.0
"""Shows a plan to people (tables) and to programs (JSON). GB is 10^9 bytes throughout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.plan import memory as memory_of
from megatron_g2rpo.plan.memory import StageMemory
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.sizes import modules_of
from megatron_g2rpo.plan.verdict import Verdict
from megatron_g2rpo.plan.vision import sees
from megatron_g2rpo.plan.wire import OPTIMIZER_STEP, ROLLOUT_STEP, total

GB = 1e9


def tables(plan: Plan, verdict: Verdict, memory: float, *estimates: RenderableType) -> RenderableType:
    """Return the whole plan as tables and text, for a terminal.

    Args:
        plan: the plan.
        verdict: whether it fits, and what to change otherwise.
        memory: bytes of one GPU.
        estimates: tables of what is estimated, the time of a step and what sharing prompts saves.
    """
    return Group(
        Text(_layout(plan)),
        Text(),
        _memory(plan),
        Text("\n".join([_phases(plan), *_host(plan)])),
        Text(),
        _micro_batches(plan),
        Text(),
        *_wires(plan),
        Text(),
        *(part for estimate in estimates for part in (estimate, Text())),
        _verdict(plan, verdict, memory),
    )


def as_json(plan: Plan, verdict: Verdict, memory: float, further: Mapping[str, Any]) -> str:
    """Return the whole plan as JSON, in bytes, tokens and seconds; the first arguments are those of ``tables``.

    Args:
        further: entries of their own, by name: the estimated time, both ways of sharing, a rehearsal.
    """
    return json.dumps({**_tree(plan, verdict, memory), **further}, indent=2)


def _layout(plan: Plan) -> str:
    layout, recipe = plan.layout, plan.recipe
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    return (
        f"{recipe.policy.model_name}: {plan.model.numel / GB:.3f} billion parameters, {recipe.policy.precision}\n"
        f"{recipe.world_size} processes = tensor {layout.tensor} x pipeline {layout.pipeline} x context "
        f"{layout.context} x data {recipe.data_parallel_size}{sequence}; the model and the recipe divide so\n"
        f"layers of {_modules(plan)}\n"
        f"assumed: sequences of {plan.assumptions.sequence_tokens:,} tokens, {plan.assumptions.response_tokens:,} of "
        f"them the response{_image(plan)}"
    )


def _modules(plan: Plan) -> str:
    modules = modules_of(plan.recipe, plan.model.config)
    names = {"local": "local modules", "transformer_engine": "Transformer Engine"}
    fp8 = "" if modules.fp8 is None else f", FP8 ({modules.fp8})"
    attention = "" if modules.attention == modules.layers else f", attention of {names[modules.attention]}"
    return f"{names[modules.layers]}{attention}{fp8}"


def _image(plan: Plan) -> str:
    if not sees(plan.model.config):
        return " (--mean-tokens, --response-tokens); a text-only model"
    image = f"{plan.assumptions.image_tokens:,} tokens"
    return f", one image of {image} a prompt (--mean-tokens, --response-tokens, --image-tokens)"


_MEMORY_LINES: tuple[tuple[str, str], ...] = (
    ("weights", "weights"),
    ("fp8", "FP8 copies of weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("engine", "rollout engine, held throughout"),
    ("layers", "activations: layers"),
    ("vision", "activations: vision"),
    ("output", "activations: output layer"),
    ("boundary", "activations: stage boundaries"),
    ("working", "update: working memory"),
    ("cache", "generation: key/value cache"),
    ("generation", "generation: working memory"),
    ("step", "optimizer step: working memory"),
    ("stream", "weight stream: working memory"),
    ("allowance", "allowance (context, NCCL, fragmentation)"),
)


def _lines(stage: StageMemory) -> dict[str, int]:
    """Return the bytes by line of the table; activations are those of all micro-batches in flight."""
    return {
        "weights": stage.state.weights,
        "fp8": stage.state.fp8,
        "gradients": stage.state.gradients,
        "optimizer": stage.state.optimizer,
        "engine": stage.engine_weights,
        "layers": stage.in_flight * stage.layer_activations,
        "vision": stage.in_flight * stage.vision_activations,
        "output": stage.in_flight * stage.output_activations,
        "boundary": stage.in_flight * stage.boundary,
        "working": stage.update_working,
        "cache": stage.cache,
        "generation": stage.generation_working,
        "step": stage.optimizer_working,
        "stream": stage.stream_working,
        "allowance": stage.allowance,
    }


def _shown(plan: Plan) -> list[StageMemory]:
    """Return the stages to show: the first, the second, the worst and the last."""
    numbers = {0, len(plan.stages) - 1, plan.worst.stage, min(1, len(plan.stages) - 1)}
    return [plan.stages[number] for number in sorted(numbers)]


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory of a rank, GB", title_justify="left", title_style="bold")
    table.add_column("")
    stages = _shown(plan)
    for stage in stages:
        count = f"{stage.layers} layers, {stage.in_flight} in flight"
        worst = len(stages) > 1 and stage.stage == plan.worst.stage
        title = f"stage {stage.stage}{' (the most)' if worst else ''}\n{count}"
        table.add_column(title, justify="right", style="bold red" if worst else "")
    lines = [_lines(stage) for stage in stages]
    for key, name in _MEMORY_LINES:
        if any(line[key] for line in lines):
            table.add_row(name, *(_gb(line[key]) for line in lines), end_section=key in {"engine", "stream"})
    table.add_row("peak", *(_gb(stage.peak) for stage in stages), end_section=True)
    table.add_row("its phase", *(stage.phase for stage in stages))
    return table


def _phases(plan: Plan) -> str:
    worst = plan.worst
    phases = ", ".join(f"{name} {_gb(size)}" for name, size in worst.phases.items())
    return f"Stage {worst.stage} holds {_gb(worst.persistent)} throughout; a phase adds its own: {phases}."


def _host(plan: Plan) -> Iterator[str]:
    """Iterate over what is said of the hosts' memory: nothing where no image features are kept."""
    cached = plan.vision_cache
    if cached.most:
        room = (
            f", room for {cached.images:,} images of {plan.assumptions.image_tokens:,} tokens" if cached.image else ""
        )
        yield (
            f"On the host a rank keeps up to {_gb(cached.most)} GB of image features (policy.vision_cache_mb{room}), "
            f"the {plan.recipe.cluster.gpus_per_node} of a node {_gb(cached.node)} GB."
        )


def _micro_batches(plan: Plan) -> Table:
    row, (sequence, multiple) = plan.batches.row, plan.multiples
    table = Table(title="Micro-batches", title_justify="left", title_style="bold", show_header=False)
    split = f" (over {plan.layout.tensor} ranks between their regions)" if plan.layout.sequence_parallel else ""
    facts = {
        "tokens of a full row": f"{row.tokens:,} (a multiple of {multiple}; sequences of {sequence})",
        "on one rank": f"{plan.local_tokens:,} tokens{split}",
        "images of a row": f"{len(row.images)} of {plan.assumptions.image_tokens:,} tokens",
        "optimizer steps a step": f"{plan.updates}",
        "micro-batches an optimizer step": f"{plan.batches.count} for {plan.batches.sequences} sequences a data rank",
        "pipeline bubble": f"{plan.bubble:.1%}",
    }
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _wires(plan: Plan) -> Iterator[RenderableType]:
    title = "Bytes that a rank sends, GB (ring algorithms)"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("what", "collective", "ranks"):
        table.add_column(name)
    stages = _shown(plan)
    for stage in stages:
        table.add_column(f"stage {stage.stage}", justify="right")
    accounts = [plan.traffic[stage.stage] for stage in stages]
    for per in (OPTIMIZER_STEP, ROLLOUT_STEP):
        keys = dict.fromkeys(
            (line.what, line.collective, line.group) for account in accounts for line in account if line.per == per
        )
        if not keys:
            continue
        table.add_row(Text(f"every {per}", style="italic"))
        for key in keys:
            sent = [
                sum(
                    line.sent for line in account if (line.what, line.collective, line.group) == key and line.per == per
                )
                for account in accounts
            ]
            table.add_row(*key, *(_gb(size) for size in sent))
        sums = [_gb(total(list(account), per)) for account in accounts]
        table.add_row("together", "", "", *sums, end_section=True)
    if table.row_count:
        yield table
    else:
        yield Text("Nothing travels: there is one process.")


def _verdict(plan: Plan, verdict: Verdict, memory: float) -> Text:
    peak = f"{_gb(plan.worst.peak)} GB on stage {plan.worst.stage} ({plan.worst.phase})"
    if verdict.fits:
        return Text(f"Fits {_gb(memory)} GB: {peak}.", style="green")
    text = Text(f"Does not fit {_gb(memory)} GB: {peak}.", style="red")
    if verdict.change is None:
        return text.append(f"\nNone of {verdict.tried} changes tried fits either: take more or larger GPUs.")
    other = verdict.change.plan.worst
    text.append(
        f"\nFits with {_gb(other.peak)} GB ({other.phase}), the first of {verdict.tried} changes tried that does:"
    )
    for override in verdict.change.overrides:
        text.append(f"\n  {shlex.quote(override)}", style="bold")
    return text


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}" if size else "-"


def _tree(plan: Plan, verdict: Verdict, memory: float) -> dict[str, Any]:
    layout, change = plan.layout, verdict.change
    return {
        "model": {"name": plan.recipe.policy.model_name, "parameters": plan.model.numel},
        "layout": {**asdict(layout), "data": plan.recipe.data_parallel_size},
        "assumptions": asdict(plan.assumptions),
        "micro_batches": {
            "row_tokens": plan.batches.row.tokens,
            "local_tokens": plan.local_tokens,
            "sequence_multiple": plan.multiples[0],
            "row_multiple": plan.multiples[1],
            "images": len(plan.batches.row.images),
            "computed_tokens": plan.batches.computed,
            "responses_of_a_prompt": plan.batches.together,
            "per_optimizer_step": plan.batches.count,
            "sequences": plan.batches.sequences,
            "optimizer_steps_per_step": plan.updates,
            "bubble": plan.bubble,
        },
        "stages": [_stage_tree(plan, stage) for stage in plan.stages],
        "worst_stage": plan.worst.stage,
        "host": {"vision_cache": plan.vision_cache.most, "vision_cache_of_a_node": plan.vision_cache.node},
        "allowance": {"fixed": memory_of.FIXED_ALLOWANCE, "fragmentation": memory_of.FRAGMENTATION},
        "verdict": {
            "gpu_memory": round(memory),
            "peak": plan.worst.peak,
            "fits": verdict.fits,
            "change": None if change is None else {"overrides": change.overrides, "peak": change.plan.worst.peak},
            "changes_tried": verdict.tried,
        },
    }


def _stage_tree(plan: Plan, stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": stage.layers,
        "in_flight": stage.in_flight,
        "parameters": stage.state.parameters,
        "memory": _lines(stage),
        "phases": stage.phases,
        "persistent": stage.persistent,
        "peak": stage.peak,
        "traffic": [asdict(line) for line in plan.traffic[stage.stage]],
    }
