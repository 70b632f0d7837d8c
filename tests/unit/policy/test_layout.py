# SPDX-License-Identifier: Apache-2.0
"""Claim: a layout that the model or the world cannot be split into is refused with the key and the number."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layout import Layout, LayoutError, check_layout
from tests.tiny_model import tiny_config


@pytest.mark.parametrize(
    ("tensor", "what"), [(3, "attention heads"), (4, "key/value heads")], ids=["heads", "kv-heads"]
)
def test_tensor_parallelism_that_does_not_divide_the_heads(tensor: int, what: str) -> None:
    with pytest.raises(LayoutError, match=f"tensor_model_parallel_size={tensor} does not divide the model's . {what}"):
        check_layout(tiny_config(heads=4, kv_heads=2), Layout(tensor=tensor))


def test_a_world_that_holds_no_whole_number_of_replicas() -> None:
    assert Layout(tensor=2).data(6) == 3
    with pytest.raises(LayoutError, match="5 processes"):
        Layout(tensor=2).data(5)


def test_another_model_family() -> None:
    config = tiny_config()
    config.model_type = "llava"
    with pytest.raises(LayoutError, match="'llava' is not supported"):
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
