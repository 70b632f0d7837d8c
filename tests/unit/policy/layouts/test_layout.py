# SPDX-License-Identifier: Apache-2.0
"""Claim: a layout that the model or the world cannot be split into is refused with the key and the number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import FP8_TOKEN_ALIGNMENT, Layout, LayoutError, check_layout, token_multiples
from tests.common.tiny_model import tiny_config


def transformer_config_for(layers: int, layout: Layout) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
    )


def test_tensor_parallelism_that_does_not_divide_the_heads() -> None:
    with pytest.raises(LayoutError, match="tensor_model_parallel_size=3 does not divide the model's 4 attention heads"):
        check_layout(tiny_config(heads=4, kv_heads=2), Layout(tensor=3))
    with pytest.raises(LayoutError, match="2 neither divides nor is a multiple of the 3 key/value heads"):
        check_layout(tiny_config(heads=6, kv_heads=3), Layout(tensor=2))
    check_layout(tiny_config(heads=4, kv_heads=2), Layout(tensor=4))  # two ranks share a key/value head


@pytest.mark.parametrize(
    ("layers", "layout", "expected"),
    [
        (4, Layout(), (4,)),
        (4, Layout(pipeline=2), (2, 2)),
        (5, Layout(pipeline=2, first_stage_layers=3), (3, 2)),
        (5, Layout(pipeline=2, last_stage_layers=1), (4, 1)),
        (7, Layout(pipeline=4, first_stage_layers=2, last_stage_layers=1), (2, 2, 2, 1)),
        (5, Layout(pipeline=2, first_stage_layers=2, last_stage_layers=3), (2, 3)),
    ],
)
def test_layers_of_the_stages(layers: int, layout: Layout, expected: tuple[int, ...]) -> None:
    assert layout.stage_layers(layers) == expected
    megatron = transformer_config_for(layers, layout)
    built = tuple(
        get_num_layers_to_build(config=megatron, vp_stage=None, pp_rank=rank) for rank in range(len(expected))
    )
    assert built == expected


@pytest.mark.parametrize(
    ("layers", "layout", "message"),
    [
        (5, Layout(pipeline=2), "5 layers do not divide over 2 stages"),
        (6, Layout(pipeline=3, first_stage_layers=3), "3 layers do not divide over 2 stages"),
        (2, Layout(pipeline=4), "the model's 2 layers cannot be spread over 4 pipeline stages"),
        (4, Layout(pipeline=2, first_stage_layers=4), "the model's 4 layers cannot be spread over 2"),
        (5, Layout(pipeline=2, first_stage_layers=2, last_stage_layers=2), "the model's 5 layers cannot be spread"),
        (4, Layout(first_stage_layers=2), "need policy.megatron_cfg.pipeline_model_parallel_size above 1"),
    ],
)
def test_stages_that_do_not_add_up(layers: int, layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout.stage_layers(layers)


def test_a_first_stage_that_deepstack_reaches_beyond() -> None:
    config = tiny_config(layers=4, deepstack=(0, 1, 2))
    with pytest.raises(LayoutError, match=r"first pipeline stage has 2 .* first 3 \(deepstack\)"):
        check_layout(config, Layout(pipeline=2))
    check_layout(config, Layout(pipeline=2, first_stage_layers=3))


def test_sequence_parallelism_without_tensor_parallelism() -> None:
    with pytest.raises(LayoutError, match="sequence_parallel needs"):
        check_layout(tiny_config(), Layout(sequence_parallel=True))


@pytest.mark.parametrize(
    ("layout", "fp8", "expected"),
    [
        (Layout(), None, (1, 1)),
        (Layout(tensor=4), None, (1, 1)),
        (Layout(tensor=4, sequence_parallel=True), None, (1, 4)),
        (Layout(context=2), None, (4, 4)),
        (Layout(tensor=2, context=2, sequence_parallel=True), None, (4, 4)),
        (Layout(tensor=4, context=2, sequence_parallel=True), None, (4, 8)),
        (Layout(tensor=3, context=2, sequence_parallel=True), None, (4, 12)),
        (Layout(), "delayed", (1, 16)),
        (Layout(tensor=2), "tensorwise", (1, 16)),
        (Layout(tensor=2, sequence_parallel=True), "tensorwise", (1, 32)),
        (Layout(context=2), "delayed", (4, 32)),
        (Layout(tensor=2, sequence_parallel=True), "mxfp8", (1, 64)),
        (Layout(tensor=2, context=2, sequence_parallel=True), "blockwise", (4, 512)),
    ],
)
def test_token_multiples(layout: Layout, fp8: str | None, expected: tuple[int, int]) -> None:
    alignment = 1 if fp8 is None else FP8_TOKEN_ALIGNMENT[fp8]
    assert token_multiples(replace(layout, token_alignment=alignment)) == expected


def test_a_world_that_holds_no_whole_number_of_replicas() -> None:
    assert Layout(tensor=2).data(6) == 3
    with pytest.raises(LayoutError, match="5 processes"):
        Layout(tensor=2).data(5)


def test_another_model_family() -> None:
    config = tiny_config()
    config.model_type = "llava"
    message = (
        r"policy\.model_name: unknown model family 'llava' \(did you mean 'llama'\?\); known: llama, .*qwen3, qwen3_vl"
    )
    with pytest.raises(LayoutError, match=message):
        check_layout(config, Layout())


def test_the_cpu_stands_in_for_cuda_only_inside_the_context() -> None:
    device = select("cpu")
    before = torch.cuda.current_device
    with device.megatron(), device.megatron():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(1).cuda().device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.current_device is before
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message of a machine without a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        select("gpu")
    with pytest.raises(ValueError, match="none of auto, cpu, gpu"):
        select("tpu")
