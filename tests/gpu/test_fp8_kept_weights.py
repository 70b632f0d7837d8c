# SPDX-License-Identifier: Apache-2.0
"""Weights of which a quantised copy is kept over a step: it is renewed with them, and rollouts get none of it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.types import PackedBatch
from megatron_g2rpo.weights import SafetensorsDirectory
from tests.common.parity import TEMPERATURE, toy_loss
from tests.gpu.devices import needs_cuda, needs_transformer_engine
from tests.gpu.fp8_policy import fp8_policy, rows, sequences

pytestmark = [needs_cuda, needs_transformer_engine]


def _responses(batches: list[PackedBatch], policy: MegatronPolicy | ReferencePolicy) -> Tensor:
    """Return the log-probabilities of all responses, one after the other."""
    values = policy.logprobs(batches, TEMPERATURE)
    found: dict[int, Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        found.update(response_values(batch, value.logprobs))
    return torch.cat([found[index] for index in sorted(found)])


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_changed_weights_are_quantised_again(recipe: str, device: Device, directory: Path) -> None:
    """After an update, after a load, and with a reference policy's weights for a while."""
    policy = fp8_policy(directory, device, recipe)
    batches = rows(policy, sequences(policy.hf_config))
    first = _responses(batches, policy)
    initial = {name: tensor.cpu().clone() for name, tensor in policy.stream()}
    reference = ReferencePolicy(policy)
    policy.update(batches, toy_loss, TEMPERATURE)
    updated = _responses(batches, policy)
    assert not torch.equal(updated, first)
    assert torch.equal(_responses(batches, reference), first)
    assert torch.equal(_responses(batches, policy), updated)
    policy.load(initial, source="the first weights")
    assert torch.equal(_responses(batches, policy), first)


def test_a_quantised_weight_that_is_not_renewed_is_seen(device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, "tensorwise")
    batches = rows(policy, sequences(policy.hf_config))
    policy.logprobs(batches, TEMPERATURE)
    policy.update(batches, toy_loss, TEMPERATURE)
    with patch.object(MegatronModule, "set_is_first_microbatch", lambda module: None):
        stale = _responses(batches, policy)
    assert not torch.equal(stale, _responses(batches, policy))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_rollouts_get_the_unquantised_weights(recipe: str, device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, recipe, precision="bfloat16")
    pretrained = dict(SafetensorsDirectory(directory / "fp8_model"))
    for name, tensor in policy.stream():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.cpu(), pretrained[name].bfloat16()), name
    policy.update(rows(policy, sequences(policy.hf_config)), toy_loss, TEMPERATURE)
    main = dict(policy.stream(lambda weight: weight.main_param.view(weight.shape)))
    moved = 0
    for name, tensor in policy.stream():
        assert torch.equal(tensor.cpu(), main[name].cpu().bfloat16()), name
        moved += not torch.equal(tensor.cpu(), pretrained[name].bfloat16())
    assert moved > len(main) / 2
