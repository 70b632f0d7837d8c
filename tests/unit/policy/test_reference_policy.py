# SPDX-License-Identifier: Apache-2.0
"""Claims: the reference policy stays what it was, and measuring it leaves the policy as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_stays_while_the_policy_learns(tmp_path: Path, precision: str) -> None:
    make_tiny_qwen3vl(tmp_path, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    options = layout_options(tmp_path, precision=precision, lr=1e-2)
    policy = MegatronPolicy(options, select("cpu"), seed=0, max_steps=10)
    batches = packer_for(policy.hf_config, policy.layout).pack(random_sequences(policy.hf_config), budget=200)
    before = policy.logprobs(batches)
    reference = ReferencePolicy(policy)
    policy.update(batches, toy_loss)
    after = policy.logprobs(batches)
    held = reference.logprobs(batches)
    for first, frozen, learned in zip(before, held, after, strict=True):
        assert torch.equal(frozen.logprobs, first.logprobs)
        assert float((learned.logprobs - first.logprobs).abs().max()) > 0.01
    for now, learned in zip(policy.logprobs(batches), after, strict=True):
        assert torch.equal(now.logprobs, learned.logprobs)


def test_an_update_goes_on_from_the_policy_not_from_the_reference(tmp_path: Path) -> None:
    """Weights, and the optimizer's own copies of them."""
    make_tiny_qwen3vl(tmp_path, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)

    def trained(*, measured: bool) -> dict[str, torch.Tensor]:
        policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=10)
        batches = packer_for(policy.hf_config, policy.layout).pack(random_sequences(policy.hf_config), budget=200)
        reference = ReferencePolicy(policy)
        for _ in range(2):
            policy.update(batches, toy_loss)
            if measured:
                reference.logprobs(batches)
        return {name: tensor.clone() for name, tensor in policy.stream()}

    plain, measured = trained(measured=False), trained(measured=True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


def test_weights_come_back_when_measuring_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_qwen3vl(tmp_path, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=10)
    reference = ReferencePolicy(policy)
    batches = packer_for(policy.hf_config, policy.layout).pack(random_sequences(policy.hf_config), budget=200)
    policy.update(batches, toy_loss)
    learned = {name: tensor.clone() for name, tensor in policy.stream()}

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "logprobs", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        reference.logprobs(batches)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in policy.stream())
