# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` says about a recipe: the kernels that it would really use on this machine, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_g2rpo import models
from megatron_g2rpo.commands.doctor.findings import Finding
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.policy.device import Device, KernelError
from megatron_g2rpo.policy.kernels import Kernels, check_heads, check_training, choose
from megatron_g2rpo.policy.layouts.layout import Layout, LayoutError, check_model, layout_of, token_multiples
from megatron_g2rpo.policy.machine import Machine
from megatron_g2rpo.policy.transformer_engine_probe import Answer, AttentionShape
from megatron_g2rpo.recipe import Policy, Recipe
from megatron_g2rpo.train.run.trackers import feed as trackers

_GROUP = "recipe"
# Rollout engine -> the package that it needs in the training environment; servers are spoken to by vLLM's classes.
_ENGINES = {"vllm": "vllm", "vllm_server": "vllm"}


@dataclass(frozen=True)
class Wanted:
    """What a recipe would use.

    Attributes:
        recipe: the recipe.
        device: the device of its processes.
        kernels: its kernels on this machine; None where it is refused.
        attention: the attention of its rows, where Transformer Engine computes it; None: it does not, or the model is
            not here.
        refusals: what the recipe cannot have here: the place and the message.
    """

    recipe: Recipe
    device: Device
    kernels: Kernels | None
    attention: AttentionShape | None
    refusals: Sequence[tuple[str, str]]


def needed_packages(recipe: Recipe | None) -> dict[str, str]:
    """Return optional package -> what of a recipe needs it, on any machine."""
    if recipe is None:
        return {}
    backend = recipe.policy.generation.backend
    needed = {name: f"logger.{name}_enabled needs it" for name in trackers.enabled(recipe.logger)}
    if backend in _ENGINES:
        needed[_ENGINES[backend]] = f"policy.generation.backend={backend} needs it"
    return needed


def wanted(recipe: Recipe, device: Device, machine: Machine) -> Wanted:
    """Find out what a recipe would use on a machine; what is refused is part of the answer."""
    policy, layout = recipe.policy, layout_of(recipe.policy.megatron_cfg)
    refusals: list[tuple[str, str]] = []
    chosen, shape = None, None
    try:
        chosen = choose(policy, layout, machine)
        check_training(chosen, machine)
    except KernelError as error:
        refusals.append(("kernels", str(error)))
    hf_config = _config(policy.model_name)
    if hf_config is not None:
        try:
            check_model(hf_config, policy.megatron_cfg)
            if chosen is not None:
                check_heads(chosen, layout, hf_config)
        except (LayoutError, KernelError) as error:
            refusals.append(("layout" if isinstance(error, LayoutError) else "kernels", str(error)))
        else:
            if chosen is not None and chosen.attention == "transformer_engine":
                shape = attention_shape(policy, layout, hf_config)
    return Wanted(recipe, device, chosen, shape, refusals)


def _config(name: str) -> Any | None:
    """The model's configuration; None where its name is no directory: nothing is downloaded for a report."""
    return load_config(name) if Path(name).is_dir() else None


def attention_shape(policy: Policy, layout: Layout, hf_config: Any) -> AttentionShape:
    """Return the attention of a full row with the longest sequences that a recipe allows, on one rank."""
    sizes = models.family(hf_config.model_type).config(hf_config)
    longest, row = policy.max_total_sequence_length, policy.sequence_packing.train_mb_tokens
    return AttentionShape(
        dtype=policy.precision,
        heads=sizes["num_attention_heads"] // layout.tensor,
        groups=max(1, sizes["num_query_groups"] // layout.tensor),
        head_dim=sizes["kv_channels"],
        sequences=max(1, row // longest),
        longest=longest,
        tokens=row // layout.context,
        padded=token_multiples(layout) != (1, 1),
        context=layout.context,
        cp_comm_type=policy.megatron_cfg.cp_comm_type,
        shared_prefix=policy.sequence_packing.shared_prefix,
    )


def transformer_engine_findings(answer: Answer, device: Device) -> Iterator[Finding]:
    """Say what Transformer Engine says of itself."""
    row = partial(Finding, "Transformer Engine")
    if answer.cudnn is not None:
        yield row("cuDNN", answer.cudnn)
    for recipe, reason in answer.fp8.items():
        yield row(f"FP8 {recipe}", "absent" if reason else "available", "absent" if reason else "ok", reason)
    if device.kind == "cpu":
        yield row(
            "device", "none", "warning", "it is installed where there is no GPU, and megatron-core takes parts of it"
        )


def findings(asked: Wanted, no_device: str | None, answer: Answer | None) -> Iterator[Finding]:
    """Say what a recipe would use, and what of it this machine lacks.

    Args:
        asked: what it would use.
        no_device: why it cannot have its device; None: it can.
        answer: Transformer Engine's; None where it is not installed.
    """
    row = partial(Finding, _GROUP)
    if no_device is not None:
        yield row("cluster.device", asked.recipe.cluster.device, "error", no_device)
    for what, message in asked.refusals:
        yield row(what, "refused", "error", message)
    if asked.kernels is not None:
        for what, choice, why in asked.kernels.describe():
            yield row(what, choice, "ok", why)
    yield from _attention_backend(asked, answer)
    yield from _fp8(asked, answer)
    yield from _runtime(asked)


def _attention_backend(asked: Wanted, answer: Answer | None) -> Iterator[Finding]:
    """What Transformer Engine would take for the recipe's rows."""
    row = partial(Finding, _GROUP, "attention backend")
    if asked.kernels is None or asked.kernels.attention != "transformer_engine":
        return
    if asked.attention is None:
        name = asked.recipe.policy.model_name
        yield row("unknown", "warning", f"depends on the heads of {name}, which is no directory of this machine")
    elif answer is None or answer.attention is None:
        yield row("unknown", "error", "Transformer Engine could not be asked, see above")
    else:
        shape = asked.attention
        rows = f"{shape.dtype}, {shape.heads} heads over {shape.groups}, {'padded' if shape.padded else 'tight'} rows"
        yield _backend("attention backend", rows, answer.attention, answer.excluded)
        if answer.shared_attention is not None:
            shared = f"{shape.dtype}, responses to one prompt, which has more keys than they have queries"
            yield _backend("shared prompts", shared, answer.shared_attention, answer.shared_excluded)


def _backend(what: str, rows: str, choice: str, excluded: Sequence[str]) -> Finding:
    reasons = "; ".join(excluded)
    if choice:
        return Finding(_GROUP, what, choice, "ok", f"Transformer Engine's choice for {rows}. {reasons}".rstrip())
    return Finding(_GROUP, what, "none", "error", f"Transformer Engine has no attention for {rows}: {reasons}")


def _fp8(asked: Wanted, answer: Answer | None) -> Iterator[Finding]:
    settings = asked.recipe.policy.megatron_cfg.fp8_cfg
    if not settings.enabled or answer is None or settings.fp8_recipe not in answer.fp8:
        return
    if reason := answer.fp8[settings.fp8_recipe]:
        yield Finding(_GROUP, f"FP8 {settings.fp8_recipe}", "not available", "error", reason)


def _runtime(asked: Wanted) -> Iterator[Finding]:
    """What the recipe itself decides, on any machine, and what it means here."""
    row = partial(Finding, _GROUP)
    megatron, policy = asked.recipe.policy.megatron_cfg, asked.recipe.policy
    layout, ddp = layout_of(megatron), megatron.distributed_data_parallel_config
    yield row("precision", policy.precision)
    sequence, tokens = token_multiples(layout)
    yield row(
        "padding", f"sequences to multiples of {sequence} tokens, rows of {tokens}", "ok", "what layout and FP8 divide"
    )
    yield row("collectives", asked.device.backend, "ok", f"device {asked.device.kind}")
    overlaps = [name for name in ("overlap_grad_reduce", "overlap_param_gather") if getattr(ddp, name)]
    where = "sharded over data-parallel ranks" if ddp.use_distributed_optimizer else "whole on every rank"
    yield row(
        "optimizer state", where, "ok", f"use_distributed_optimizer is {str(ddp.use_distributed_optimizer).lower()}"
    )
    when = "while others compute" if overlaps else "after the backward pass"
    yield row("gradient reduction", when, "ok", " and ".join(overlaps) or "overlap_grad_reduce is false")
    yield row("rollouts", policy.generation.backend, "ok", "policy.generation.backend")
    for name, value in megatron.env_vars.items():
        yield row("environment", f"{name}={value}", "ok", "env_vars")
