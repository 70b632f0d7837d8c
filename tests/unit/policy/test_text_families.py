# SPDX-License-Identifier: Apache-2.0
"""Claims: the policy of a model of text alone computes what transformers computes, and the engine samples from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, PackSequence, response_values
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.types import ModelInputs, Prompt, Sample, TokenStats
from tests.common.parity import TEMPERATURE
from tests.common.policy_layout import layout_options
from tests.common.text_models import MODELS, make_text_model

# fp32 noise over four layers, as for the models that see.
TOLERANCE = 1e-5
NO_GRIDS = torch.zeros(0, 3, dtype=torch.int64)


def sequences(vocab: int) -> list[PackSequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        PackSequence(
            inputs=ModelInputs(
                token_ids=torch.randint(2, vocab, (prompt,), generator=generator),
                pixel_values=torch.zeros(0, 0),
                image_grid_thw=NO_GRIDS,
            ),
            response_ids=torch.randint(2, vocab, (response,), generator=generator),
            advantage=advantage,
        )
        for prompt, response, advantage in ((5, 7, 1.0), (100, 1, -2.0), (9, 30, 0.5))
    ]


def loss(batch: Any, stats: TokenStats) -> LossTerms:
    terms = -(batch.advantages * stats.logprobs).sum() + 0.1 * (stats.entropy * batch.loss_mask).sum()
    return LossTerms(loss=terms, num_tokens=batch.num_tokens, sums={})


def expected(model: Any, items: list[PackSequence]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """transformers: log-probabilities of every response, and the gradient of ``loss``."""
    total = sum(len(item.response_ids) for item in items)
    logprobs, value = [], torch.zeros(())
    for item in items:
        ids, start = torch.cat([item.inputs.token_ids, item.response_ids]), len(item.inputs.token_ids) - 1
        log_p = (model(input_ids=ids[None], use_cache=False).logits[0, start:-1] / TEMPERATURE).log_softmax(-1)
        logprob = log_p.gather(1, item.response_ids[:, None]).squeeze(1)
        value = value + (-item.advantage * logprob.sum() + 0.1 * -(log_p.exp() * log_p).sum()) / total
        logprobs.append(logprob.detach())
    model.zero_grad()
    value.backward()
    return logprobs, {name: weight.grad for name, weight in model.named_parameters()}


def _main_grad(weight: Any) -> Tensor:
    return weight.main_grad


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_of_text_equals_transformers(tmp_path: Path, name: str, tied: bool) -> None:
    model = make_text_model(tmp_path, name, tied=tied)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=3)
    items = sequences(model.config.vocab_size)
    (row,) = Packer(image_token_id=-1, spatial_merge_size=1, pad_token_id=0).pack(items, budget=500)
    logprobs, gradients = expected(model, items)
    (stats,) = policy.logprobs([row], TEMPERATURE)
    for index, values in response_values(row, stats.logprobs).items():
        assert float((values - logprobs[index]).abs().max()) <= TOLERANCE
    policy.gradients([row], loss, TEMPERATURE)
    ours = {key: gradient.clone() for key, gradient in policy.stream(_main_grad)}
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert float((ours[key] - gradient).norm() / gradient.norm()) <= TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_answers_as_transformers_generates(tmp_path: Path, name: str) -> None:
    model = make_text_model(tmp_path, name, tied=True)
    engine = TransformersEngine(
        tmp_path, device="cpu", dtype=torch.float32, eos_token_ids=[1], pad_token_id=0, banned_token_ids=[],
        decode=str, max_new_tokens=12, batch_size=4,
    )  # fmt: skip
    engine.load_weights((key, tensor) for key, tensor in model.state_dict().items())
    prompts = [
        Prompt(
            sample=Sample(key=str(index), task="t", question="", answer="", answer_format="exact"),
            inputs=item.inputs,
            task_id=0,
        )
        for index, item in enumerate(sequences(model.config.vocab_size))
    ]
    for rollout in engine.generate(prompts, 1, sampling=Sampling(temperature=0.0), seed=0, group_ids=[0, 1, 2]):
        ids = rollout.prompt.inputs.token_ids[None]
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert output[0, ids.shape[1] :].tolist() == rollout.response_ids.tolist()
    sampled = engine.generate(prompts, 3, sampling=Sampling(temperature=0.7), seed=0, group_ids=[0, 1, 2])
    for rollout in sampled:
        ids = torch.cat([rollout.prompt.inputs.token_ids, rollout.response_ids])
        start = len(rollout.prompt.inputs.token_ids) - 1
        with torch.no_grad():
            log_p = (model(input_ids=ids[None], use_cache=False).logits[0, start:-1] / 0.7).log_softmax(-1)
        theirs = log_p.gather(1, rollout.response_ids[:, None]).squeeze(1)
        assert float((rollout.logprobs - theirs).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_gives_what_a_filtering_engine_sampled_from(tmp_path: Path, temperature: float) -> None:
    """Its distribution is over the tokens that were kept: else engine and trainer would be nats apart."""
    make_text_model(tmp_path, "qwen3", tied=True)
    policy = MegatronPolicy(layout_options(tmp_path), select("cpu"), seed=0, max_steps=3)
    engine = TransformersEngine(
        tmp_path, device="cpu", dtype=torch.float32, eos_token_ids=[1], pad_token_id=0, banned_token_ids=[],
        decode=str, max_new_tokens=12, batch_size=4,
    )  # fmt: skip
    engine.load_weights(policy.stream())
    vocab = policy.model.language_model.output_layer.vocab_size
    prompts = [
        Prompt(
            sample=Sample(key=str(index), task="t", question="", answer="", answer_format="exact"),
            inputs=item.inputs,
            task_id=0,
        )
        for index, item in enumerate(sequences(vocab))
    ]
    sampling = Sampling(temperature=temperature, top_k=9, top_p=0.8, min_p=0.01, return_kept=True)
    rollouts = engine.generate(prompts, 3, sampling=sampling, seed=0, group_ids=[0, 1, 2])
    packer = Packer(image_token_id=-1, spatial_merge_size=1, pad_token_id=0)

    def gap(kept: bool) -> float:
        items = [
            PackSequence(inputs=r.prompt.inputs, response_ids=r.response_ids, kept_ids=r.kept_ids if kept else None)
            for r in rollouts
        ]
        batches = packer.pack(items, budget=300)
        found = {
            index: values
            for batch, stats in zip(batches, policy.logprobs(batches, temperature), strict=True)
            for index, values in response_values(batch, stats.logprobs).items()
        }
        return max(float((rollouts[index].logprobs - values).abs().max()) for index, values in found.items())

    assert gap(kept=True) <= TOLERANCE
    assert gap(kept=False) > 0.1


def test_an_image_for_a_model_of_text_is_an_error(tmp_path: Path) -> None:
    make_text_model(tmp_path, "qwen3", tied=True)
    engine = TransformersEngine(
        tmp_path, device="cpu", dtype=torch.float32, eos_token_ids=[1], pad_token_id=0, banned_token_ids=[],
        decode=str, max_new_tokens=2, batch_size=4,
    )  # fmt: skip
    engine.load_weights((key, tensor) for key, tensor in make_text_model(None, "qwen3", tied=True).state_dict().items())
    inputs = ModelInputs(
        token_ids=torch.tensor([3]), pixel_values=torch.zeros(4, 6), image_grid_thw=torch.tensor([[1, 2, 2]])
    )
    sample = Sample(key="s/1", task="t", question="", answer="", answer_format="exact")
    with pytest.raises(ValueError, match="prompt 's/1' has images, but Qwen3ForCausalLM reads text alone"):
        engine.generate(
            [Prompt(sample=sample, inputs=inputs, task_id=0)],
            1,
            sampling=Sampling(temperature=0.0),
            seed=0,
            group_ids=[0],
        )
