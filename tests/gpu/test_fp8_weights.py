# SPDX-License-Identifier: Apache-2.0
"""Weights that are FP8 (``fp8_param``), over optimizer steps: what they compute, stream and lend a reference policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.policy import quantized
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.optimizer_shares import piece, single
from megatron_g2rpo.policy.quantized import is_float8tensor
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import TEMPERATURE, toy_loss
from tests.gpu.devices import needs_cuda, needs_transformer_engine
from tests.gpu.fp8_policy import fp8_policy, rows, sequences, te_linears

pytestmark = [needs_cuda, needs_transformer_engine]

RECIPES = [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")]
E4M3_MAX = 448.0
WEIGHT = 1  # of input, weight and output


def build(directory: Path, device: Device, recipe: str | None, format: str, fp8_param: bool) -> MegatronPolicy:
    keys = (
        f"fp8_cfg.fp8_param={str(fp8_param).lower()}",
        "distributed_data_parallel_config.use_distributed_optimizer=true",
    )
    overrides = [f"megatron_cfg.{key}" for key in keys]
    return fp8_policy(directory, device, recipe, format, *overrides, precision="bfloat16", lr=1e-4)


def stepped(policy: MegatronPolicy, steps: int = 2) -> list[PackedBatch]:
    batches = rows(policy, sequences(policy.hf_config))
    for _ in range(steps):
        policy.update(batches, toy_loss, TEMPERATURE)
    return batches


def logprobs(policy: MegatronPolicy | ReferencePolicy, batches: list[PackedBatch]) -> Tensor:
    return torch.cat([stats.logprobs for stats in policy.logprobs(batches, TEMPERATURE)])


def masters(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Return the float32 copies by Hugging Face name. One rank has them whole."""
    part = single(policy._training()[1])
    found = policy.stream(lambda weight: piece(part, weight).detach().view(weight.shape))
    return {name: tensor.cpu().clone() for name, tensor in found}


def raw(policy: MegatronPolicy) -> Iterator[tuple[str, Tensor]]:
    """Yield every buffer of the FP8 weights: bytes, transposed bytes, and the scales of both."""
    buffers = ("_data", "_transpose", "_scale_inv", "_rowwise_data", "_columnwise_data")
    for name, weight in policy.model.named_parameters():
        if is_float8tensor(weight):
            held: Any = weight
            for buffer in (*buffers, "_rowwise_scale_inv", "_columnwise_scale_inv"):
                if (tensor := getattr(held, buffer, None)) is not None:
                    yield f"{name}{buffer}", tensor.cpu().clone()


@pytest.mark.parametrize(("recipe", "format"), RECIPES)
def test_two_steps_compute_stream_and_lend(recipe: str, format: str, device: Device, directory: Path) -> None:
    plain = build(directory, device, recipe, format, fp8_param=False)
    expected = logprobs(plain, stepped(plain))
    exact = build(directory, device, None, format, fp8_param=False)
    noise = float((logprobs(exact, stepped(exact)) - expected).abs().mean())

    policy = build(directory, device, recipe, format, fp8_param=True)
    batches = rows(policy, sequences(policy.hf_config))
    first, first_raw = logprobs(policy, batches), dict(raw(policy))
    assert first_raw
    reference = ReferencePolicy(policy)
    stepped(policy)
    found, held, main = logprobs(policy, batches), dict(raw(policy)), masters(policy)

    # The weights were rounded from the same values: what is left is where the two runs' roundings differ, less than
    # what FP8 itself changes (measured: 0.7 of it, blockwise 0.8).
    assert float((found - expected).abs().mean()) < noise
    # Rollouts get what the weights were rounded from.
    streamed = {name: tensor.cpu().clone() for name, tensor in policy.stream()}
    assert streamed.keys() == main.keys()
    assert all(torch.equal(streamed[name], main[name].bfloat16()) for name in main)
    # The reference policy is the policy of before, to the bit, and leaves the policy and its masters as they are.
    assert any(not torch.equal(held[name], first_raw[name]) for name in first_raw)
    with reference._in_place():
        lent = dict(raw(policy))
        assert lent.keys() == first_raw.keys()
        assert all(torch.equal(lent[name], first_raw[name]) for name in lent)
    if recipe != "delayed":  # whose scales of activations have moved
        assert torch.equal(logprobs(reference, batches), first)
    after = dict(raw(policy))
    assert after.keys() == held.keys()
    assert all(torch.equal(after[name], held[name]) for name in held)
    assert all(torch.equal(tensor, main[name]) for name, tensor in masters(policy).items())
    assert torch.equal(logprobs(policy, batches), found)


def _weight_scales(policy: MegatronPolicy) -> tuple[list[float], list[float]]:
    """Return the delayed scales of the FP8 weights, and those that their own magnitudes ask for."""
    found, expected = [], []
    for module in te_linears(policy).values():
        found.append(float(module.fp8_meta["scaling_fwd"].scale[WEIGHT]))
        expected.append(E4M3_MAX / float(module.weight.dequantize().abs().max()))
    return found, expected


def test_delayed_scales_are_those_of_the_weights(device: Device, directory: Path) -> None:
    """From the first pass on, whatever the memory held before the weights were loaded."""
    policy = build(directory, device, "delayed", "hybrid", fp8_param=True)
    for steps in (0, 2):
        stepped(policy, steps)
        found, expected = _weight_scales(policy)
        # The history's maximum is of one step before: two steps of 1e-4 on a largest weight of some 0.3.
        assert found == pytest.approx(expected, rel=1e-2)


def test_magnitudes_of_memory_before_loading_are_seen(device: Device, directory: Path) -> None:
    with patch.object(quantized, "_start_scale", lambda parameter, value: None):
        policy = build(directory, device, "delayed", "hybrid", fp8_param=True)
    stepped(policy)
    found, expected = _weight_scales(policy)
    assert all(abs(one / other - 1) > 0.5 for one, other in zip(found, expected, strict=True))
