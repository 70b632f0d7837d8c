# SPDX-License-Identifier: Apache-2.0
"""What the values of a recipe must satisfy, alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe.base import Section
from megatron_g2rpo.recipe.keys import dotted_keys
from megatron_g2rpo.recipe.schema import SftRecipe, TrainRecipe
from tests.common.recipes import G2RPO

MEGATRON = "policy.megatron_cfg"
DDP = f"{MEGATRON}.distributed_data_parallel_config"


def load(*overrides: str) -> recipe.TrainRecipe:
    return recipe.load(G2RPO, list(overrides), "train")


@pytest.mark.parametrize(
    "override",
    [
        "grpo.max_num_steps=0",
        "grpo.val_period=-1",
        "grpo.overlong=drop",
        "grpo.adv_estimator.tie_tolerance=-1e-6",
        "grpo.adv_estimator.zero_variance=pin",
        "grpo.adv_estimator.stages=[]",
        "grpo.adv_estimator.stages=[task, group]",
        "grpo.adv_estimator.stages=[group, group]",
        "grpo.adv_estimator.stages=[batch]",
        "loss_fn.name=''",
        "loss_fn.ratio_clip_min=1.1",
        "loss_fn.ratio_clip_max=0.0",
        "loss_fn.ratio_clip_c=1.0",
        "checkpointing.save_period=0",
        "checkpointing.keep_top_k=0",
        "policy.init=scratch",
        "policy.precision=float16",
        "policy.logprob_chunk_size=0",
        f"{MEGATRON}.pipeline_model_parallel_size=0",
        f"{MEGATRON}.context_parallel_size=0",
        f"{MEGATRON}.num_layers_in_first_pipeline_stage=0",
        f"{MEGATRON}.core_attention=flash",
        f"{MEGATRON}.cp_comm_type=ring",
        f"{MEGATRON}.recompute_granularity=none",
        f"{MEGATRON}.recompute_method=null",
        f"{MEGATRON}.recompute_num_layers=0",
        f"{MEGATRON}.optimizer.lr=0.0",
        f"{MEGATRON}.optimizer.adam_beta2=1.0",
        f"{MEGATRON}.optimizer.clip_grad=0.0",
        f"{MEGATRON}.scheduler.lr_decay_style=inverse",
        "policy.generation.temperature=0.0",
        "policy.generation.val_temperature=0.0",
        "policy.generation.top_k=0",
        "policy.generation.top_k=129",
        "policy.generation.val_top_k=0",
        "policy.generation.val_top_p=0.0",
        "policy.generation.val_top_p=1.01",
        "policy.generation.val_min_p=1.01",
        "policy.generation.stop_strings=['']",
        "policy.generation.val_stop_strings=stop",
        "policy.generation.backend=sglang",
        "policy.generation.gap_warning=0.0",
        "policy.generation.vllm_cfg.gpu_memory_utilization=1.5",
        "policy.generation.vllm_server_cfg.addresses=['127.0.0.1:8000']",
        "policy.generation.vllm_server_cfg.addresses=['http://127.0.0.1:8000/v1']",
        "policy.generation.vllm_server_cfg.on_no_server=retry",
        "data.on_bad_sample=ignore",
        "data.task_weights={ocr: -1.0}",
        "env.tasks={_override_: true}",
        "env.reward_weights.accuracy=-0.1",
        "cluster.device=cuda",
    ],
)
def test_a_value_out_of_its_range_is_refused(override: str) -> None:
    with pytest.raises(recipe.RecipeError, match=override.partition("=")[0]):
        load(override)


@pytest.mark.parametrize(
    ("override", "meaning"),
    [
        ("policy.generation.top_k=-1", "from all tokens"),
        ("policy.generation.val_top_k=-1", "off"),
        ("policy.generation.min_p=0.0", "off"),
        ("checkpointing.keep_top_k=-1", "all"),
        ("loss_fn.importance_sampling.truncated_ratio=0.0", "the loss is not weighted"),
    ],
)
def test_where_others_write_a_number_for_off_or_all_the_message_says_null(override: str, meaning: str) -> None:
    with pytest.raises(recipe.RecipeError, match=rf"\(null: {meaning}\)"):
        load(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.tasks.ocr.length={start: 20, peak_start: 10}"], r"start \(20\) <= peak_start \(10\)"),
        (["env.tasks.ocr.length={peak_end: 10}"], r"peak_start \(16\) <= peak_end \(10\)"),
        (["env.tasks.ocr.length={end: 90}"], r"peak_end \(96\) <= end \(90\)"),
        (["env.tasks.ocr.entropy={low: 0.7}"], r"low \(0\.7\) <= high \(0\.6\)"),
        (
            ["env.tasks.ocr.length.peak_start=3000", "env.tasks.ocr.length={peak_end: 3000, end: 3000}"],
            "no response of",
        ),
        (["data.min_pixels=200", "data.max_pixels=100"], r"min_pixels \(200\) <= max_pixels \(100\)"),
        ([f"{MEGATRON}.optimizer.min_lr=1.0"], r"min_lr \(1\.0\) <= lr \(2e-06\)"),
        (["policy.max_total_sequence_length=2048"], "leaves no room for a prompt"),
        (["policy.sequence_packing.train_mb_tokens=4095"], r"train_mb_tokens \(4095\) is less than"),
        (["policy.generation.backend=vllm_server"], "needs the addresses of its servers"),
        (["policy.generation.top_p=0.95"], r"top_p without top_k would keep any number (.|\n)*generation\.top_p"),
        (
            ["policy.generation={top_p: 0.9, min_p: 0.1}"],
            r"top_p and min_p without top_k (.|\n)*generation\.top_p(.|\n)*generation\.min_p",
        ),
        (["policy.generation.backend=vllm", "policy.generation.batch_size=4"], "decodes the 8 responses of a prompt"),
        (
            ["policy.generation.vllm_server_cfg.addresses=['http://a:1', 'http://b:1', 'http://a:1']"],
            "a server is listed twice: http://a:1, http://b:1, http://a:1",
        ),
        (["policy.train_global_batch_size=768"], "does not divide the 1024 rollouts"),
        (["grpo.num_generations_per_prompt=1"], "a group of 1 has no advantage"),
        ([f"{MEGATRON}.tensor_model_parallel_size=2"], "= 1, not a multiple of the 2"),
        (
            [f"{MEGATRON}.pipeline_model_parallel_size=2", f"{MEGATRON}.context_parallel_size=2"],
            r"not a multiple of the 4 (.|\n)*pipeline_model_parallel_size.*context_parallel_size",
        ),
        ([f"{MEGATRON}.sequence_parallel=true"], "sequence_parallel needs tensor_model_parallel_size above 1"),
        (
            [f"{MEGATRON}.num_layers_in_first_pipeline_stage=2"],
            "num_layers_in_first_pipeline_stage needs pipeline_model_parallel_size above 1",
        ),
        (
            [f"{MEGATRON}.num_layers_in_last_pipeline_stage=2"],
            "num_layers_in_last_pipeline_stage needs pipeline_model_parallel_size above 1",
        ),
        ([f"{DDP}.overlap_param_gather=true"], "needs use_distributed_optimizer and overlap_grad_reduce"),
        (
            [f"{DDP}={{overlap_param_gather: true, use_distributed_optimizer: true}}"],
            "overlap_param_gather needs overlap_grad_reduce",
        ),
        (
            [f"{MEGATRON}={{fp8_cfg: {{enabled: true}}, transformer_impl: local}}"],
            r"FP8 needs the layers of Transformer Engine(.|\n)*transformer_impl(.|\n)*fp8_cfg\.enabled",
        ),
        (
            ["checkpointing.metric_name=val/mean_accurracy"],
            r"'val/mean_accurracy' is no metric of this recipe's validation \(nearest: val/mean_accuracy; also",
        ),
        (["checkpointing.metric_name=train/reward"], "'train/reward' is no metric of this recipe's validation"),
        (
            [
                "checkpointing.metric_name=val/mean_reward",
                "grpo={val_period: 0, val_at_start: false, val_at_end: false}",
            ],
            r"ranked by val/mean_reward, and nothing validates(.|\n)*metric_name(.|\n)*grpo\.val_period",
        ),
        (["data.task_weights={orc: 2.0}"], r"'orc' is not a task of env\.tasks \(nearest: ocr\)"),
        (
            [
                f"data.task_weights.{task}=0"
                for task in ("general_vqa_science_stem", "spatial_grounding", "spatial_reasoning")
            ]
            + [f"data.task_weights.{task}=0" for task in ("ocr", "math_reasoning", "chart_figure_qa")],
            "every task has weight 0",
        ),
        (
            [f"{MEGATRON}.scheduler={{lr_decay_style: linear, lr_warmup_steps: 10, lr_decay_steps: 10}}"],
            "would still warm up",
        ),
        (
            [f"{MEGATRON}.scheduler={{lr_decay_style: cosine, lr_warmup_steps: 400}}"],
            r"would still warm up \(400 optimizer steps\) when its decay ends \(at 400\)",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(recipe.RecipeError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["grpo.num_generations_per_prompt=1", "grpo.adv_estimator.stages=[task]", "policy.train_global_batch_size=128"],
        ["env.tasks.ocr.length={start: 8, peak_start: 8, peak_end: 8, end: 8}"],
        ["env.tasks.ocr={length: null, entropy: null, answer_format: exact}"],
        ["loss_fn.ratio_clip_c=null", "policy.logprob_chunk_size=null", "checkpointing.keep_top_k=null"],
        ["checkpointing={metric_name: val/mean_greedy_accuracy, async_save: true}"],
        ["checkpointing={metric_name: val/ocr/response_tokens, higher_is_better: false}"],
        ["checkpointing.metric_name=val/mean_format", "grpo.val_period=0", "grpo.val_at_end=false"],
        ["policy.train_global_batch_size=1024"],
        ["policy.generation={top_k: 128, top_p: 1.0, min_p: 1.0, stop_strings: [</answer>]}"],
        ["policy.generation={top_k: null, top_p: 1.0}"],  # NeMo-RL's and verl's "off", which keeps every token
        ["policy.generation={val_top_k: 1000, val_top_p: 0.95, val_min_p: 0.01, val_stop_strings: [a, b]}"],
        ["data.task_weights={ocr: 0.0, math_reasoning: 2}"],
        ["policy.sequence_packing.train_mb_tokens=4096"],
        [f"{MEGATRON}.scheduler={{lr_decay_style: cosine, lr_warmup_steps: 399}}"],
        [f"{MEGATRON}.tensor_model_parallel_size=2", "cluster.gpus_per_node=2"],
        [f"{MEGATRON}={{tensor_model_parallel_size: 2, sequence_parallel: true}}", "cluster.gpus_per_node=2"],
        [
            f"{MEGATRON}={{pipeline_model_parallel_size: 2, context_parallel_size: 2}}",
            f"{MEGATRON}={{num_layers_in_first_pipeline_stage: 3, num_layers_in_last_pipeline_stage: 25}}",
            "cluster.gpus_per_node=4",
        ],
        [f"{MEGATRON}={{recompute_granularity: full, recompute_method: block, recompute_num_layers: 4}}"],
        [f"{DDP}={{overlap_param_gather: true, overlap_grad_reduce: true, use_distributed_optimizer: true}}"],
        [f"{DDP}={{use_distributed_optimizer: true}}"],
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(overrides: list[str]) -> None:
    load(*overrides)


def sections(model: type[Section]) -> Iterator[type[Section]]:
    """All section classes of a recipe, found without the code under test."""
    pending: list[Any] = [model]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
            pending.extend(field.annotation for field in annotation.model_fields.values())
        else:
            pending.extend(getattr(annotation, "__args__", ()))


@pytest.mark.parametrize("model", [TrainRecipe, SftRecipe])
def test_no_key_has_a_default_and_every_key_is_described(model: type[Section]) -> None:
    found = list(sections(model))
    assert len(found) >= 20
    for section in found:
        for name, field in section.model_fields.items():
            assert field.is_required(), f"{section.__name__}.{name}: defaults live in the exemplar alone"
            assert field.description, f"{section.__name__}.{name} has no description"


def test_dotted_keys_reach_every_level() -> None:
    keys = set(dotted_keys(TrainRecipe))
    assert {"grpo", "policy.megatron_cfg.optimizer.lr", "env.tasks.<task>.length.peak_start"} <= keys
