# SPDX-License-Identifier: Apache-2.0
"""Sizes that products in FP8 take: rows are padded to them, and a model that has others is refused before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_g2rpo.policy import megatron
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.layouts.layout import LayoutError, token_multiples
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import TEMPERATURE, packer_for, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl, random_inputs
from tests.gpu.devices import needs_cuda, needs_transformer_engine, needs_virtual
from tests.gpu.fp8_policy import SHAPE, fp8_policy, reset_scales, rows, sequences

pytestmark = [needs_cuda, needs_transformer_engine]


def _row_of(policy: MegatronPolicy, tokens: int) -> list[PackedBatch]:
    """Return one row of exactly this many tokens, whatever the layout needs."""
    config = policy.hf_config
    member = sequences(config, count=1)[0]
    inputs = random_inputs(config, grids=[()], text_tokens=tokens - len(member.response_ids))[0]
    packer = replace(packer_for(config), row_multiple=1, sequence_multiple=1)
    (batch,) = packer.pack([replace(member, inputs=inputs)], tokens)
    assert len(batch.tokens) == tokens
    return [batch]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_rows_are_padded_to_what_products_need(recipe: str, device: Device, directory: Path) -> None:
    policy = fp8_policy(directory, device, recipe)
    assert token_multiples(policy.layout) == (1, 16)
    for tokens in (80, 96):
        policy.gradients(_row_of(policy, tokens), toy_loss, TEMPERATURE)
    with pytest.raises(ValueError, match="divisible by 8"):
        policy.gradients(_row_of(policy, 95), toy_loss, TEMPERATURE)


@needs_virtual
def test_a_multiple_of_8_is_not_enough_for_a_weights_gradient(device: Device, directory: Path) -> None:
    """Transformer Engine lets 88 tokens pass, and the matrix product that sums over them does not."""
    policy = fp8_policy(directory, device, "tensorwise")
    policy.logprobs(_row_of(policy, 88), TEMPERATURE)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        policy.gradients(_row_of(policy, 88), toy_loss, TEMPERATURE)


def test_features_that_products_do_not_take_are_refused_before(device: Device, tmp_path: Path) -> None:
    make_tiny_qwen3vl(tmp_path, **{**SHAPE, "intermediate": 264})
    keys = ["core_attention=local", "fp8_cfg.enabled=true", "fp8_cfg.fp8_recipe=tensorwise"]
    section = layout_options(tmp_path, *(f"megatron_cfg.{key}" for key in keys))
    with pytest.raises(LayoutError, match=r"multiples of 16, and a rank has 264 MLP features"):
        MegatronPolicy(section, device, seed=0, max_steps=1)
    # It is what Transformer Engine would say in the first pass.
    with patch.object(megatron, "check_model", lambda *arguments: None):
        reset_scales()
        policy = MegatronPolicy(section, device, seed=0, max_steps=1)
    with pytest.raises((ValueError, RuntimeError), match="16"):
        policy.logprobs(rows(policy, sequences(policy.hf_config)), TEMPERATURE)
