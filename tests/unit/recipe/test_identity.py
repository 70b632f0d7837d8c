# SPDX-License-Identifier: Apache-2.0
"""Fingerprints and dumps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_g2rpo import recipe, registry
from megatron_g2rpo.recipe.identity import NOT_IDENTITY
from megatron_g2rpo.recipe.keys import dotted_keys
from megatron_g2rpo.recipe.schema import SftRecipe, TrainRecipe
from tests.common.recipes import G2RPO, SFT
from tests.unit.recipe.conftest import RECIPES

MEGATRON = "policy.megatron_cfg"
DDP = f"{MEGATRON}.distributed_data_parallel_config"


def fingerprint(*overrides: str) -> str:
    return recipe.fingerprint(recipe.load(G2RPO, list(overrides), "train"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.num_nodes=2", "cluster.gpus_per_node=4", f"{MEGATRON}.tensor_model_parallel_size=4"],
        [
            "cluster.gpus_per_node=8",
            f"{MEGATRON}={{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, context_parallel_size: 2}}",
            f"{MEGATRON}={{sequence_parallel: true, num_layers_in_first_pipeline_stage: 12, cp_comm_type: a2a}}",
            f"{MEGATRON}={{num_layers_in_last_pipeline_stage: 16, core_attention: local}}",
            f"{MEGATRON}={{recompute_granularity: full, recompute_method: block, recompute_num_layers: 4}}",
            f"{DDP}={{use_distributed_optimizer: true, overlap_grad_reduce: true, overlap_param_gather: true}}",
        ],
        ["cluster.device=cpu"],
        # Other kernels of the same computation, and their settings.
        [
            f"{MEGATRON}={{transformer_impl: local, apply_rope_fusion: true, bias_activation_fusion: true}}",
            f"{MEGATRON}={{gradient_accumulation_fusion: true, env_vars: {{NCCL_DEBUG: INFO}}}}",
        ],
        ["logger.log_dir=elsewhere", "logger.tensorboard_enabled=false"],
        ["checkpointing.save_period=3", "checkpointing.enabled=false"],
        ["policy.generation.batch_size=3"],
        ["policy.sequence_packing.train_mb_tokens=5000"],
        ["policy.logprob_chunk_size=null"],
        ["grpo.max_num_steps=7", "grpo.val_period=3", "grpo.val_at_start=false"],
        [f"{MEGATRON}.optimizer.weight_decay=1.0e-2"],
        # What the error about a sample advises, validation, and where things are.
        ["data.on_bad_sample=skip", "data.max_pixels=100000", "policy.max_total_sequence_length=8000"],
        ["data.validation.path=elsewhere", "grpo.max_val_samples=3", "policy.generation.val_temperature=0.5"],
        ["data.validation=null", "grpo.val_period=0", "grpo.val_at_start=false", "grpo.val_at_end=false"],
        ["data.train.path=elsewhere"],
    ],
)
def test_a_run_may_continue_with_another_layout_or_length(overrides: list[str]) -> None:
    assert fingerprint(*overrides) == fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "grpo.seed=43",
        "grpo.num_prompts_per_step=256",
        "grpo.adv_estimator.zero_variance=keep",
        "loss_fn.ratio_clip_c=null",
        "policy.model_name=elsewhere",
        "policy.train_global_batch_size=128",
        "policy.precision=float32",
        f"{MEGATRON}.optimizer.lr=1e-6",
        f"{MEGATRON}.freeze_vision=true",
        # Weights are learnt with what FP8 rounds them to.
        f"{MEGATRON}.fp8_cfg.enabled=true",
        f'{MEGATRON}.env_vars={{NVTE_FP8_BLOCK_SCALING_FP32_SCALES: "1"}}',
        f"{DDP}.grad_reduce_in_fp32=false",
        "policy.generation.temperature=0.9",
        "data.task_weights={ocr: 2.0}",
        "env.tasks.ocr.length=null",
        "env.reward_weights.length=0.0",
    ],
)
def test_what_is_learned_makes_another_run(override: str) -> None:
    assert fingerprint(override) != fingerprint()


def test_the_last_step_counts_where_the_learning_rate_decays_towards_it() -> None:
    decay = f"{MEGATRON}.scheduler.lr_decay_style=cosine"
    fixed = f"{MEGATRON}.scheduler.lr_decay_steps=50"
    assert fingerprint(decay) != fingerprint(decay, "grpo.max_num_steps=7")
    assert fingerprint(decay, fixed) == fingerprint(decay, fixed, "grpo.max_num_steps=7")


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    # Python salts its own hashes per process, and a run directory outlives them all.
    code = "import sys; from megatron_g2rpo import recipe as r; print(r.fingerprint(r.load(sys.argv[1], [], 'train')))"
    other = subprocess.run(
        [sys.executable, "-c", code, str(G2RPO)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=RECIPES.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == fingerprint()
    assert len(fingerprint()) == 16


def test_every_excluded_key_exists() -> None:
    judge = (f"env.reward_options.judge.{option}" for option in registry.reward_parts.options("judge"))
    known = {*dotted_keys(TrainRecipe), *dotted_keys(SftRecipe), *judge}
    assert set(NOT_IDENTITY) <= known


def test_identities_say_what_differs() -> None:
    a = recipe.identity(recipe.load(G2RPO, [], "train"))
    b = recipe.identity(recipe.load(G2RPO, ["grpo.seed=43", "cluster.num_nodes=2"], "train"))
    assert {key for key in a if a[key] != b[key]} == {"grpo.seed"}


@pytest.mark.parametrize(("path", "kind"), [(G2RPO, "train"), (SFT, "sft")])
def test_a_dump_loads_to_an_equal_recipe(tmp_path: Path, path: Path, kind: str) -> None:
    # 1/3 and 1e-7 have no short decimal form: the text must still give back every bit.
    odd = ["env.reward_weights.length=0.3333333333333333", f"{MEGATRON}.optimizer.adam_eps=1e-7"]
    overrides = [*odd, "data.system_prompt='yes: \"é\"'"]
    loaded = recipe.load(path, overrides, kind)  # type: ignore[call-overload]
    dumped = tmp_path / "recipe.yaml"
    dumped.write_text(recipe.dump(loaded), encoding="utf-8")
    assert recipe.load(dumped, [], kind) == loaded  # type: ignore[call-overload]


def test_the_layout_is_described() -> None:
    layout = ["cluster.num_nodes=2", "cluster.gpus_per_node=4", f"{MEGATRON}.tensor_model_parallel_size=2"]
    assert recipe.describe_layout(recipe.load(G2RPO, layout, "train")).splitlines() == [
        "processes: 8 = 2 node(s) x 4",
        "layout: tensor 2 x pipeline 1 x context 1 x data 4",
        "layers: auto",
        "core attention: auto",
        "recompute: none",
        "optimizer: whole on every rank",
        "micro-batch row: 8192 tokens, responses share their prompt",
        "step: 128 prompts x 8 generations = 1024 rollouts, 4 update(s) of 256",
    ]
    layout = [
        "cluster.gpus_per_node=16",
        f"{MEGATRON}={{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, context_parallel_size: 2}}",
        f"{MEGATRON}={{sequence_parallel: true, num_layers_in_first_pipeline_stage: 12}}",
        f"{MEGATRON}={{recompute_granularity: full, recompute_num_layers: 2}}",
        f"{DDP}={{use_distributed_optimizer: true, overlap_grad_reduce: true, overlap_param_gather: true}}",
    ]
    assert recipe.describe_layout(recipe.load(G2RPO, layout, "train")).splitlines()[1:7] == [
        "layout: tensor 2 x pipeline 2 x context 2 x data 2, sequence parallel",
        "language layers: 12 on the first stage, the others shared out evenly",
        "layers: auto",
        "core attention: auto, p2p with Transformer Engine",
        "recompute: whole layers, 2 at a time, and the vision tower",
        "optimizer: shared out over data-parallel ranks; gradients reduced during the backward pass; weights gathered "
        "during the forward pass",
    ]
    layers = [f"{MEGATRON}={{transformer_impl: transformer_engine, apply_rope_fusion: true}}"]
    described = recipe.describe_layout(recipe.load(G2RPO, layers, "train"))
    assert "layers: transformer_engine, apply_rope_fusion" in described.splitlines()
    sft = recipe.load(SFT, [], "sft")
    assert recipe.describe_layout(sft).splitlines()[-1] == "step: 128 sequences, 1 update"


def test_a_dump_has_the_sections_in_the_order_of_the_exemplar() -> None:
    lines = recipe.dump(recipe.load(G2RPO, [], "train")).splitlines()
    sections = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["grpo", "loss_fn", "checkpointing", "policy", "data", "env", "logger", "cluster"]


def test_keys_of_fp8_count_where_it_is_on() -> None:
    """A run of a release without FP8 goes on, and one with it only as it began."""
    on = f"{MEGATRON}.fp8_cfg.enabled=true"
    for key in ("fp8_cfg.fp8_recipe=tensorwise", "first_last_layers_bf16=true"):
        assert fingerprint(f"{MEGATRON}.{key}") == fingerprint()
        assert fingerprint(on, f"{MEGATRON}.{key}") != fingerprint(on)
    assert not any("fp8" in key or "bf16" in key for key in recipe.identity(recipe.load(G2RPO, [], "train")))
