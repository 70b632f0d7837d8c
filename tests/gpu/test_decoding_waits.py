# SPDX-License-Identifier: Apache-2.0
"""Claims: on a GPU the embedded engine answers as on the CPU, and waits for the device twice a decoding step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.types import Rollout
from tests.common.tiny_model import as_prompt, make_tiny_qwen3vl, random_inputs, special_tokens
from tests.gpu.devices import needs_virtual

pytestmark = pytest.mark.without_transformer_engine

VOCAB = 160
TOKENS = special_tokens(VOCAB)


def respond(model: Any, device: torch.device, tokens: int, temperature: float, samples: int) -> list[Rollout]:
    """Responses to a prompt without images, to one with one and to one with two."""
    config, network = model
    engine = TransformersEngine(
        config,
        device=device,
        dtype=torch.float32,
        eos_token_ids=(TOKENS.eos,),
        pad_token_id=TOKENS.pad,
        banned_token_ids=TOKENS.banned,
        decode=lambda ids: " ".join(map(str, ids)),
        max_new_tokens=tokens,
        batch_size=64,
    )
    engine.load_weights((name, tensor.to(device)) for name, tensor in network.named_parameters())
    grids = ((), ((4, 6),), ((2, 4), (6, 4)))
    prompts = [as_prompt(each, str(i)) for i, each in enumerate(random_inputs(config, grids=grids))]
    sampling = Sampling(temperature=temperature)
    return engine.generate(prompts, samples, sampling=sampling, seed=5, group_ids=list(range(len(prompts))))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_qwen3vl(vocab=VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_responses_are_those_of_the_cpu(model: Any, temperature: float) -> None:
    ours, theirs = (
        respond(model, device, 24, temperature, samples=4) for device in (select().torch_device, torch.device("cpu"))
    )
    assert len(ours) == len(theirs) == 12
    for one, other in zip(ours, theirs, strict=True):
        assert one.response_ids.device.type == one.logprobs.device.type == "cpu"
        assert one.response_ids.tolist() == other.response_ids.tolist()
        # fp32 over a few layers, in other orders of sums.
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0.0)


@needs_virtual
def test_a_decoding_step_waits_for_its_logits_to_be_finite_and_for_the_number_that_go_on(model: Any) -> None:
    from tests.gpu.virtual_cuda import counted_synchronisations

    waits = {}
    for tokens in (4, 12):
        with counted_synchronisations(within="megatron_g2rpo/rollout") as counts:
            rollouts = respond(model, select().torch_device, tokens, temperature=0.0, samples=1)
        assert all(len(rollout.response_ids) == tokens for rollout in rollouts), "none may end before"
        waits[tokens] = sum(counts.values())
    assert waits[12] - waits[4] == 2 * (12 - 4), counts
