# SPDX-License-Identifier: Apache-2.0
"""Claim: where the engine filters tokens, the trainer's log-probabilities are those of what was sampled from.

The oracle is transformers alone: its forward pass of each response, unpadded, and its own logits processors in vLLM's
order (banned tokens, temperature, ``min_p``, ``top_k``, ``top_p``), with the gradient that autograd takes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_g2rpo.data.packing import PackSequence, response_values
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.types import PackedBatch, Rollout, TokenStats
from tests.common.parity import packer_for
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import as_prompt, hf_logits, make_tiny_qwen3vl, random_inputs, special_tokens

TEMPERATURE, VOCAB = 1.7, 160
# fp32 noise of a few layers.
TOLERANCE = 1e-5


def warped(logits: Tensor, banned: Sequence[int], sampling: Sampling) -> Tensor:
    steps = [SuppressTokensLogitsProcessor(list(banned)), TemperatureLogitsWarper(TEMPERATURE)]
    if sampling.min_p is not None:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k is not None:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        steps.append(TopPLogitsWarper(sampling.top_p))
    processors: Any = LogitsProcessorList(steps)
    return processors(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


def loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    return LossTerms(loss=(stats.logprobs * batch.loss_mask).sum(), num_tokens=batch.num_tokens, sums={})


@pytest.mark.parametrize(
    "filters", [{"top_k": 9}, {"top_k": 40, "top_p": 0.7}, {"top_k": 60, "top_p": 0.9, "min_p": 0.05}, {"top_k": 1}]
)
def test_the_trainer_replays_what_the_engine_sampled_from(tmp_path: Path, filters: dict[str, Any]) -> None:
    config, model = make_tiny_qwen3vl(tmp_path, vocab=VOCAB)
    tokens = special_tokens(VOCAB)
    policy = MegatronPolicy(
        layout_options(tmp_path), select("cpu"), seed=0, max_steps=3, banned_token_ids=tokens.banned
    )
    engine = TransformersEngine(
        tmp_path, device="cpu", dtype=torch.float32, eos_token_ids=[tokens.eos], pad_token_id=tokens.pad,
        banned_token_ids=tokens.banned, decode=str, max_new_tokens=12, batch_size=5,
    )  # fmt: skip
    engine.load_weights(policy.source())
    sampling = Sampling(temperature=TEMPERATURE, return_kept=True, **filters)
    prompts = [as_prompt(inputs, str(index)) for index, inputs in enumerate(random_inputs(config))]
    rollouts = engine.generate(prompts, 3, sampling=sampling, seed=1, group_ids=range(len(prompts)))

    expected = [_oracle(model, rollout, tokens.banned, sampling) for rollout in rollouts]
    items = [
        PackSequence(inputs=r.prompt.inputs, response_ids=r.response_ids, kept_ids=r.kept_ids, advantage=1.0)
        for r in rollouts
    ]
    (row,) = packer_for(config).pack(items, budget=5000)
    (stats,) = policy.logprobs([row], TEMPERATURE)
    replayed, entropies = response_values(row, stats.logprobs), response_values(row, stats.entropy)
    for index, (rollout, (logprobs, entropy)) in enumerate(zip(rollouts, expected, strict=True)):
        assert torch.allclose(rollout.logprobs, logprobs.float(), rtol=0, atol=TOLERANCE)
        assert torch.allclose(replayed[index], logprobs, rtol=0, atol=TOLERANCE)
        assert torch.allclose(entropies[index], entropy, rtol=0, atol=TOLERANCE)

    model.zero_grad()
    torch.cat([logprobs for logprobs, _ in expected]).mean().backward()
    policy.gradients([row], loss, TEMPERATURE)
    ours = {name: gradient.clone() for name, gradient in policy.stream(_main_grad)}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        difference = float((ours[name] - weight.grad).norm())
        assert difference <= 10 * TOLERANCE * (float(weight.grad.norm()) + 1.0), name


def _main_grad(weight: Any) -> Tensor:
    return weight.main_grad


def _oracle(model: Any, rollout: Rollout, banned: Sequence[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[R]``, with their graph, and entropies ``[R]`` of a response."""
    start = len(rollout.prompt.inputs.token_ids) - 1
    logits = hf_logits(model, rollout.prompt.inputs, rollout.response_ids)[start:-1]
    log_p = warped(logits, banned, sampling).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0.0)).sum(-1)
    return log_p.gather(1, rollout.response_ids[:, None]).squeeze(1), entropy.detach()
