# SPDX-License-Identifier: Apache-2.0
"""Claims: a decoding step from the parameters equals transformers' forward pass, and the general step does so too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Qwen2Config, Qwen2ForCausalLM

from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.dense_step import DenseStep, decoder_of
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.rollout.transformers.model_step import ModelStep
from megatron_g2rpo.types import ModelInputs, Prompt, Sample
from tests.common.text_models import MODELS, make_text_model
from tests.common.tiny_model import make_tiny_qwen3vl, randomise

# fp32 noise over a few layers.
ATOL = 1e-5


def engine_of(config: Any, model: Any, **changes: Any) -> TransformersEngine:
    options = {
        "device": "cpu",
        "dtype": torch.float32,
        "eos_token_ids": [1],
        "pad_token_id": 0,
        "banned_token_ids": [],
        "decode": str,
        "max_new_tokens": 12,
        "batch_size": 4,
    }
    engine = TransformersEngine(config, **{**options, **changes})
    engine.load_weights(model.named_parameters())
    return engine


def text_prompts(vocab: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(
            sample=Sample(key=str(length), task="t", question="", answer="", answer_format="exact"),
            inputs=ModelInputs(
                token_ids=torch.randint(2, vocab, (length,), generator=generator),
                pixel_values=torch.zeros(0, 0),
                image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
            ),
            task_id=0,
        )
        for length in (5, 1, 40)
    ]


def largest_difference(engine: TransformersEngine, model: Any) -> float:
    """Between the reported log-probabilities and those of a forward pass of the whole sequence, alone and unpadded."""
    worst = 0.0
    prompts = text_prompts(model.config.vocab_size)
    for rollout in engine.generate(prompts, 3, sampling=Sampling(temperature=1.0), seed=0, group_ids=[0, 1, 2]):
        ids = torch.cat([rollout.prompt.inputs.token_ids, rollout.response_ids])
        start = len(rollout.prompt.inputs.token_ids) - 1
        with torch.no_grad():
            table = model(input_ids=ids[None], use_cache=False).logits[0, start:-1].log_softmax(-1)
        theirs = table.gather(1, rollout.response_ids[:, None])[:, 0]
        worst = max(worst, float((rollout.logprobs - theirs).abs().max()))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_known_families_of_text_take_the_dense_step_and_it_is_exact(name: str, tmp_path: Path) -> None:
    model = make_text_model(tmp_path, name, tied=False)
    engine = engine_of(tmp_path, model)
    assert isinstance(engine._step, DenseStep)
    assert largest_difference(engine, model) <= ATOL


def test_both_steps_of_a_model_that_sees_give_the_same_responses() -> None:
    config, model = make_tiny_qwen3vl()
    engine = engine_of(config, model)
    assert isinstance(engine._step, DenseStep)
    prompts = text_prompts(100)
    dense = engine.generate(prompts, 3, sampling=Sampling(temperature=1.0), seed=0, group_ids=[0, 1, 2])
    engine._step = ModelStep(engine._model, 3)
    general = engine.generate(prompts, 3, sampling=Sampling(temperature=1.0), seed=0, group_ids=[0, 1, 2])
    for one, other in zip(dense, general, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=ATOL)


def qwen2() -> tuple[Any, Any]:
    config = Qwen2Config(
        vocab_size=150,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    randomise(model, 0)
    return config, model


def test_an_architecture_that_is_not_known_takes_its_own_forward_pass_and_it_is_exact() -> None:
    config, model = qwen2()  # its queries, keys and values have biases
    engine = engine_of(config, model)
    assert isinstance(engine._step, ModelStep)
    assert largest_difference(engine, model) <= ATOL


def test_biases_keep_a_known_class_from_the_dense_step(tmp_path: Path) -> None:
    model = make_text_model(tmp_path, "qwen3", tied=False)
    assert DenseStep.suits(model)
    for name, value in (
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ):
        former = getattr(model.config, name)
        setattr(model.config, name, value)
        assert not DenseStep.suits(model), name
        setattr(model.config, name, former)
    assert DenseStep.suits(model)


def test_attention_that_is_more_than_scaled_softmax_is_refused() -> None:
    from transformers import Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=150,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = Gemma2ForCausalLM(config).float().eval()
    randomise(model, 0)
    with pytest.raises(NotImplementedError, match="Gemma2Attention attends with"):
        largest_difference(engine_of(config, model), model)


def test_the_weights_of_several_linears_are_one_matrix_and_not_a_second_copy() -> None:
    config, model = make_tiny_qwen3vl()
    engine = engine_of(config, model)
    attention = decoder_of(engine._model).layers[1].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    theirs = dict(model.named_parameters())
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_weights_that_change_are_those_that_are_used(tmp_path: Path) -> None:
    model = make_text_model(tmp_path, "qwen3", tied=False)
    engine = engine_of(tmp_path, model)
    assert largest_difference(engine, model) <= ATOL
    randomise(model, 7)  # the norms of queries and keys among them, which the step keeps a copy of
    assert largest_difference(engine, model) > 0.01
    engine.load_weights(model.named_parameters())
    assert largest_difference(engine, model) <= ATOL
