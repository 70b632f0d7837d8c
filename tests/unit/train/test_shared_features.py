# SPDX-License-Identifier: Apache-2.0
"""Claim: an image that the engine encoded for generation is not encoded again by the policy whose weights it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from tests.common.parity import packer_for, toy_loss
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import as_prompt, make_tiny_qwen3vl, random_inputs, special_tokens

# float32 through a few layers; the features of another image give more than 0.1.
ATOL = 1e-4


@pytest.mark.parametrize("frozen", [False, True])
def test_generation_log_probabilities_and_a_frozen_tower_s_update_encode_an_image_once(
    tmp_path: Path, frozen: bool
) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    tokens = special_tokens(config.text_config.vocab_size)
    cache = VisionCache(10**7, frozen=frozen)
    options = layout_options(tmp_path, freeze_vision=frozen, lr=1e-2)
    policy = MegatronPolicy(
        options, select("cpu"), seed=0, max_steps=3, banned_token_ids=tokens.banned, vision_cache=cache
    )
    engine = TransformersEngine(
        tmp_path,
        device="cpu",
        dtype=torch.float32,
        eos_token_ids=[tokens.eos],
        pad_token_id=tokens.pad,
        banned_token_ids=tokens.banned,
        decode=lambda ids: " ".join(map(str, ids)),
        max_new_tokens=6,
        batch_size=8,
        vision_cache=cache,
    )
    runs: list[int] = []
    tower: Any = policy.model.vision_model
    tower.blocks[0].register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    prompts = [as_prompt(inputs, str(number)) for number, inputs in enumerate(random_inputs(config))]
    patches = sum(len(prompt.inputs.pixel_values) for prompt in prompts)
    for step in range(2):
        cache.begin_step()
        engine.load_weights(policy.stream())
        rollouts = engine.generate(prompts, 2, sampling=Sampling(temperature=1.0), seed=step, group_ids=[0, 1, 2])
        assert engine.work.patches == (0 if frozen and step else patches)
        rows = packer_for(config).pack(
            [
                PackSequence(
                    inputs=rollout.prompt.inputs,
                    response_ids=rollout.response_ids,
                    advantage=1.0,
                    behaviour_logprobs=rollout.logprobs,
                )
                for rollout in rollouts
            ],
            budget=1000,
        )
        for row, stats in zip(rows, policy.logprobs(rows), strict=True):
            response = row.task_ids >= 0
            gap = (stats.logprobs - row.behaviour_logprobs)[response].abs().max()
            assert gap <= ATOL, "the features are those of the weights that sampled"
        assert runs == [], "the engine's features serve"
        policy.update(rows, toy_loss)
        assert sum(runs) == (0 if frozen else patches), "what learns needs its own forward pass"
        runs.clear()
