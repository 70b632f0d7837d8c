# SPDX-License-Identifier: Apache-2.0
"""Claims: prefill and decoding from the parameters equal transformers' forward pass, and the general ones do so too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Qwen2Config, Qwen2ForCausalLM

from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.call import Call
from megatron_g2rpo.rollout.transformers.dense_forward import DenseForward, decoder_of
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.rollout.transformers.model_forward import ModelForward
from megatron_g2rpo.rollout.transformers.prefill import PrefilledPrompts, PromptTokens
from megatron_g2rpo.types import ModelInputs, Prompt, Sample
from tests.common.text_models import MODELS, make_text_model
from tests.common.tiny_model import as_prompt, make_tiny_qwen3vl, random_inputs, randomise

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
    assert isinstance(engine._forward, DenseForward)
    assert largest_difference(engine, model) <= ATOL


def in_general(engine: TransformersEngine, axes: int) -> ModelForward:
    """Let an engine take the model's own forward pass."""
    engine._forward = engine._prefill._forward = ModelForward(engine._model, axes)
    return engine._forward


@pytest.mark.parametrize("alike", [True, False], ids=["one-length", "several-lengths"])
@pytest.mark.parametrize("layers", [2, 3, 5], ids=lambda layers: f"layers-{layers}")
def test_prefill_computes_what_the_model_computes(layers: int, alike: bool) -> None:
    """Of two layers and of three the last has a level of deepstack; a prompt may end in the token of an image."""
    config, model = make_tiny_qwen3vl(layers=layers, deepstack=(0, 1, 2)[:layers])
    engine = engine_of(config, model)
    dense = engine._forward
    assert isinstance(dense, DenseForward)
    contents = Call(
        [as_prompt(each, "key") for each in random_inputs(config, grids=(((4, 6), (2, 4)), (), ((6, 4),)))],
        1,
        and_greedily=False,
    ).distinct
    if alike:
        contents = contents[:1] * 3
    else:
        ids = contents[2].token_ids
        end = int((ids == config.image_token_id).nonzero()[-1]) + 1
        contents[2] = PromptTokens(token_ids=ids[:end], images=contents[2].images)
    contents.sort(key=lambda content: -len(content.token_ids))
    dense.refresh()

    def prefilled() -> list[PrefilledPrompts]:
        return list(engine._prefill(contents, lambda some: engine._prefill.encode([i for p in some for i in p.images])))

    (ours,) = prefilled()  # all of them in one pass
    in_general(engine, 3)
    (theirs,) = prefilled()
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=ATOL)
    assert torch.equal(ours.positions, theirs.positions)
    assert ours.cache.lengths == theirs.cache.lengths == [len(content.token_ids) for content in contents]
    assert len(ours.cache.layers) == layers
    for layer in range(layers):
        for one, other in zip(ours.cache.layers[layer], theirs.cache.layers[layer], strict=True):
            for row, length in enumerate(ours.cache.lengths):
                torch.testing.assert_close(one[:, row, :length], other[:, row, :length], rtol=0, atol=ATOL)


def test_both_steps_of_a_model_that_sees_give_the_same_responses() -> None:
    config, model = make_tiny_qwen3vl()
    engine = engine_of(config, model)
    assert isinstance(engine._forward, DenseForward)
    prompts = text_prompts(100)
    dense = engine.generate(prompts, 3, sampling=Sampling(temperature=1.0), seed=0, group_ids=[0, 1, 2])
    in_general(engine, 3)
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
    assert isinstance(engine._forward, ModelForward)
    assert largest_difference(engine, model) <= ATOL


def test_biases_keep_a_known_class_from_the_dense_step(tmp_path: Path) -> None:
    model = make_text_model(tmp_path, "qwen3", tied=False)
    assert DenseForward.suits(model)
    for name, value in (
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ):
        former = getattr(model.config, name)
        setattr(model.config, name, value)
        assert not DenseForward.suits(model), name
        setattr(model.config, name, former)
    assert DenseForward.suits(model)


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
