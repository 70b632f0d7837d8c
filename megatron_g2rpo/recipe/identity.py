# SPDX-License-Identifier: Apache-2.0
"""Which keys make two recipes the same run, and a recipe written out as text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml

from megatron_g2rpo.recipe.keys import quoted
from megatron_g2rpo.recipe.policy_section import DistributedDataParallelConfig, MegatronConfig
from megatron_g2rpo.recipe.schema import Recipe, TrainRecipe

# Keys that may change between a run and its continuation: they move work over machines, memory or disk, or decide when
# something is looked at or ends, and leave what was learned so far as it is (up to the rounding of another order of
# sums). Some change what is learned from there on, such as the pixels of an image: they are what the error about a
# sample advises. `train.run.directory` says which keys a continuation has changed.
NOT_IDENTITY = (
    "imports",
    "cluster",
    "logger",
    "checkpointing",
    "data.on_bad_sample",
    # Where the data is; what is in it is known to the position of the stream (data/stream.py).
    "data.train.path",
    "data.validation",
    "data.max_pixels",
    "data.min_pixels",
    # How rewards are computed, not what they are.
    "env.reward_workers",
    "env.reward_timeout_s",
    "env.reward_batch_timeout_s",
    "env.max_failed_rewards",
    *(f"env.reward_options.judge.{key}" for key in ("addresses", "api_key_env", "cache", "concurrency", "retries")),
    "env.reward_options.judge.timeout_s",
    "grpo.max_num_steps",
    "grpo.max_val_samples",
    "grpo.val_period",
    "grpo.val_at_start",
    "grpo.val_at_end",
    "grpo.task_gradient_period",
    "sft.max_num_steps",
    "sft.max_val_samples",
    "sft.val_period",
    "sft.val_at_start",
    "sft.val_at_end",
    "policy.max_total_sequence_length",
    "policy.logprob_chunk_size",
    "policy.vision_cache_mb",
    "policy.sequence_packing",
    "policy.generation.batch_size",
    "policy.generation.gap_warning",
    "policy.generation.vllm_cfg",
    "policy.generation.vllm_server_cfg",
    "policy.megatron_cfg.tensor_model_parallel_size",
    "policy.megatron_cfg.pipeline_model_parallel_size",
    "policy.megatron_cfg.context_parallel_size",
    "policy.megatron_cfg.sequence_parallel",
    "policy.megatron_cfg.num_layers_in_first_pipeline_stage",
    "policy.megatron_cfg.num_layers_in_last_pipeline_stage",
    # Which kernels compute the same, and their switches. What `fp8_cfg` rounds to is learnt with, so it is identity.
    "policy.megatron_cfg.transformer_impl",
    "policy.megatron_cfg.core_attention",
    "policy.megatron_cfg.apply_rope_fusion",
    "policy.megatron_cfg.bias_activation_fusion",
    "policy.megatron_cfg.gradient_accumulation_fusion",
    "policy.megatron_cfg.env_vars",
    "policy.megatron_cfg.cp_comm_type",
    "policy.megatron_cfg.recompute_granularity",
    "policy.megatron_cfg.recompute_method",
    "policy.megatron_cfg.recompute_num_layers",
    # Which updates were taken so far stays as it is.
    "policy.megatron_cfg.optimizer.max_skipped_updates",
    "policy.megatron_cfg.optimizer.grad_norm_spike_factor",
    "policy.megatron_cfg.optimizer.grad_norm_spike_window",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_grad_reduce",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
    # Both optimizers write the same checkpoint: policy/optimizer_shares.py.
    "policy.megatron_cfg.distributed_data_parallel_config.use_distributed_optimizer",
)

# All keys that begin so: how validation samples.
_NOT_IDENTITY_PREFIXES = ("policy.generation.val_",)

# What begins so is identity, though the rest of its mapping is not: they choose how Transformer Engine rounds to FP8.
_IDENTITY_PREFIXES = ("policy.megatron_cfg.env_vars.NVTE_",)

# Keys that count only with `fp8_cfg.enabled`.
_OF_FP8 = (
    "policy.megatron_cfg.fp8_cfg.",
    "policy.megatron_cfg.first_last_layers_bf16",
    "policy.megatron_cfg.num_layers_at_start_in_bf16",
    "policy.megatron_cfg.num_layers_at_end_in_bf16",
)

_SECTIONS = ("imports", "grpo", "sft", "loss_fn", "checkpointing", "policy", "data", "env", "logger", "cluster")


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML: every key, resolved, in the exemplar's order; ``load`` reads it to an equal recipe."""
    tree = recipe.model_dump(mode="json")
    ordered = {section: tree[section] for section in _SECTIONS if section in tree}
    return yaml.safe_dump(ordered, sort_keys=False, width=120, allow_unicode=True)


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> value of all that defines the run; compare two of them to see what differs.

    The keys of FP8 are among them only where it is on, the number of steps only where the learning rate decays towards
    the last step.
    """
    flat = settings(recipe)
    kept = {key: value for key, value in flat.items() if not may_change(key)}
    megatron = recipe.policy.megatron_cfg
    if not megatron.fp8_cfg.enabled:  # they count only then; a run of a release without FP8 has none of them
        kept = {key: value for key, value in kept.items() if not key.startswith(_OF_FP8)}
    scheduler = megatron.scheduler
    if scheduler.lr_decay_style != "constant" and scheduler.lr_decay_steps is None:
        last_step = "grpo.max_num_steps" if isinstance(recipe, TrainRecipe) else "sft.max_num_steps"
        kept[last_step] = flat[last_step]
    return kept


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> value of every key of a recipe."""
    return flatten(recipe.model_dump(mode="json"))


def fingerprint(recipe: Recipe) -> str:
    """Return 16 hex digits, which are equal for two recipes if and only if one may continue the run of the other."""
    text = json.dumps(identity(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_layout(recipe: Recipe) -> str:
    """Describe how the run is laid out over processes, one fact per line."""
    cluster, megatron, packing = recipe.cluster, recipe.policy.megatron_cfg, recipe.policy.sequence_packing
    batch = recipe.policy.train_global_batch_size
    lines = [
        f"processes: {recipe.world_size} = {cluster.num_nodes} node(s) x {cluster.gpus_per_node}",
        f"layout: tensor {megatron.tensor_model_parallel_size} x pipeline {megatron.pipeline_model_parallel_size} x "
        f"context {megatron.context_parallel_size} x data {recipe.data_parallel_size}"
        + (", sequence parallel" if megatron.sequence_parallel else ""),
        *_stages(megatron),
        _layers(megatron),
        _attention(megatron),
        _recompute(megatron),
        _optimizer(megatron.distributed_data_parallel_config),
        f"micro-batch row: {packing.train_mb_tokens} tokens"
        + (", responses share their prompt" if packing.shared_prefix else ""),
    ]
    if isinstance(recipe, TrainRecipe):
        lines += [
            f"step: {recipe.grpo.num_prompts_per_step} prompts x {recipe.grpo.num_generations_per_prompt} generations "
            f"= {recipe.num_rollouts_per_step} rollouts, {recipe.num_updates_per_step} update(s) of {batch}",
        ]
    else:
        lines.append(f"step: {batch} sequences, 1 update")
    return "\n".join(lines)


def _stages(megatron: MegatronConfig) -> list[str]:
    outer = {
        "first": megatron.num_layers_in_first_pipeline_stage,
        "last": megatron.num_layers_in_last_pipeline_stage,
    }
    given = [f"{layers} on the {stage} stage" for stage, layers in outer.items() if layers is not None]
    return [f"language layers: {', '.join(given)}, the others shared out evenly"] if given else []


def _layers(megatron: MegatronConfig) -> str:
    fusions = ("apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion")
    fp8 = megatron.fp8_cfg
    choices = [
        megatron.transformer_impl,
        *([f"FP8 {fp8.fp8_recipe} ({fp8.fp8})"] if fp8.enabled else []),
        *(name for name in fusions if getattr(megatron, name)),
    ]
    return f"layers: {', '.join(choices)}"


def _attention(megatron: MegatronConfig) -> str:
    kernel = megatron.core_attention
    gathers = megatron.context_parallel_size > 1 and kernel != "local"
    return f"core attention: {kernel}" + (f", {megatron.cp_comm_type} with Transformer Engine" if gathers else "")


def _recompute(megatron: MegatronConfig) -> str:
    layers = megatron.recompute_num_layers
    how = {
        "uniform": f"whole layers, {layers} at a time, and the vision tower",
        "block": f"the first {layers} layer(s) of a stage, and the vision tower",
    }
    choices = {None: "none", "selective": "core attention", "full": how[megatron.recompute_method]}
    return f"recompute: {choices[megatron.recompute_granularity]}"


def _optimizer(ddp: DistributedDataParallelConfig) -> str:
    where = "shared out over data-parallel ranks" if ddp.use_distributed_optimizer else "whole on every rank"
    overlaps = [
        text
        for text, on in (
            ("gradients reduced during the backward pass", ddp.overlap_grad_reduce),
            ("weights gathered during the forward pass", ddp.overlap_param_gather),
        )
        if on
    ]
    return "; ".join([f"optimizer: {where}", *overlaps])


def may_change(key: str) -> bool:
    """Return whether a dotted key is no part of the identity, whatever else the recipe says."""
    if key.startswith(_IDENTITY_PREFIXES):
        return False
    excluded = any(key == excluded or key.startswith(f"{excluded}.") for excluded in NOT_IDENTITY)
    return excluded or key.startswith(_NOT_IDENTITY_PREFIXES)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested mappings; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{quoted(key)}."))
        else:
            flat[f"{prefix}{quoted(key)}"] = value
    return flat
