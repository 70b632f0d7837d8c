# SPDX-License-Identifier: Apache-2.0
"""The engine in process: real vLLM against transformers' ``generate`` and forward pass.

One engine serves all tests of the module: a process can hold vLLM's distributed state once.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict, replace

import pytest
import torch

from megatron_g2rpo import progress
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.stop_strings import Tail, until_stop
from megatron_g2rpo.rollout.vllm.engine import VllmEngine, _advance_with
from tests.vllm import common
from tests.vllm.common import (
    ATOL,
    filtered_logprobs,
    forward_logprobs,
    generate,
    greedy,
    kept_by_filters,
    make_prompts,
    named,
    tokens_of,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return [common.random_model(root / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def bare() -> VllmEngine:
    return VllmEngine(common.context(common.load_recipe("policy.generation.top_k=20")))


@pytest.fixture
def engine(bare: VllmEngine, models) -> VllmEngine:
    bare.load_weights(named(models[0]))
    return bare


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(12)


def test_without_weights_it_does_not_generate(bare, prompts):
    with pytest.raises(RuntimeError, match="call load_weights first"):
        generate(bare, prompts)


def test_greedy_tokens_are_those_of_transformers_on_fifty_prompts_with_images(engine, models):
    fifty = [prompt for prompt in make_prompts(75) if len(prompt.inputs.image_grid_thw)]
    assert len(fifty) == 50
    for rollout in generate(engine, fifty, 1, temperature=0.0):
        assert rollout.response_ids.tolist() == greedy(models[0], rollout.prompt, 48), rollout.prompt.key


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(engine, models, prompts, temperature):
    rollouts = generate(engine, prompts, 4, temperature=temperature)
    assert len({len(r.response_ids) for r in rollouts}) > 3, "the check must cover rows that end at different steps"
    for rollout in rollouts:
        expected = forward_logprobs(models[0], rollout, temperature)
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "sampling",
    [
        base.Sampling(temperature=1.0, top_k=20),
        base.Sampling(temperature=0.7, top_p=0.8),
        base.Sampling(temperature=1.0, min_p=0.1),
        base.Sampling(temperature=1.0, min_p=0.02, top_k=12, top_p=0.8),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_logprobs_of_a_filtered_distribution_are_those_of_what_the_embedded_engine_keeps(
    engine, models, prompts, sampling
):
    for rollout in generate(engine, prompts, 4, **asdict(sampling)):
        expected = filtered_logprobs(models[0], rollout, sampling)
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL)


def test_rollouts_say_what_each_token_was_sampled_from(engine, models, prompts):
    filters = {"top_k": 20, "top_p": 0.9}
    counts = set()
    for rollout in generate(engine, prompts, 4, return_kept=True, **filters):
        expected = kept_by_filters(models[0], rollout, base.Sampling(temperature=1.0, **filters))
        assert [row[row >= 0].tolist() for row in rollout.kept_ids] == expected
        assert (rollout.kept_ids == rollout.response_ids[:, None]).any(1).all()
        counts |= set(map(len, expected))
    assert len(counts) > 1, "top_p should leave different numbers of tokens"


def test_an_image_is_encoded_once_for_a_group_and_for_both_ways_of_answering(engine, models, prompts):
    encoded: list[int] = []

    def watch(model):
        def note(module, arguments, keywords):
            encoded.append(len(keywords["grid_thw"] if "grid_thw" in keywords else arguments[1]))

        return model.visual.register_forward_pre_hook(note, with_kwargs=True)

    (hook,) = engine._llm.apply_model(watch)
    try:
        generate(engine, prompts, 4)
        generate(engine, prompts, 1, temperature=0.0)
        images = sum(len(prompt.inputs.image_grid_thw) for prompt in prompts)
        assert sum(encoded) == images
        engine.load_weights(named(models[0]))
        generate(engine, prompts, 4)
        assert sum(encoded) == 2 * images, "other weights, other features"
    finally:
        hook.remove()


def test_the_samples_of_a_group_share_the_prefill_of_their_prompt(engine, prompts, monkeypatch):
    """In whole blocks of the cache; the second call, as validation makes it, finds all of them."""
    block = engine._llm.llm_engine.vllm_config.cache_config.block_size
    text = prompts[0].inputs
    long = replace(prompts[0], inputs=replace(text, token_ids=text.token_ids.repeat(40)[: 2 * block + 5]))
    cached: list[int] = []
    wait = engine._llm.wait_for_completion

    def noted(**keywords):
        outputs = wait(**keywords)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(engine._llm, "wait_for_completion", noted)
    generate(engine, [long], 4)
    generate(engine, [long], 1, temperature=0.0)
    assert cached[-1] == 2 * block


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(engine, prompts, temperature):
    """By the embedded engine's rule: what is decoded is searched after each token."""
    decode = ChatProcessor(common.POLICY).decode
    free = generate(engine, prompts, 4, temperature=temperature)
    # From inside of one token to inside of another.
    texts = [decode(r.response_ids[4:8]) for r in free[::5] if len(r.response_ids) > 10]
    stops = tuple({text[1:-1] for text in texts if len(text) > 4 and text.isascii()})
    assert stops
    stopped = 0
    cut = generate(engine, prompts, 4, temperature=temperature, stop_strings=stops)
    for before, after in zip(free, cut, strict=True):
        tail, ids = Tail(stops, decode), before.response_ids.tolist()
        going = ids[:-1] if ids[-1] in common.ENDS else ids
        length = next((place for place, token in enumerate(going, start=1) if tail.completes(token)), None)
        assert after.response_ids.tolist() == ids[:length], "the same draws, cut"
        if length is not None:
            stopped += 1
            assert not after.truncated
            assert after.text == until_stop(decode(ids[:length]), stops)
            assert after.text.endswith(stops)
        else:
            assert (after.truncated, after.text) == (before.truncated, before.text)
    assert stopped >= len(stops)


def test_greedy_logprobs_are_reported_at_temperature_one(engine, models, prompts):
    for rollout in generate(engine, prompts[:3], 1, temperature=0.0):
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(models[0], rollout), rtol=0, atol=ATOL)


def test_new_weights_give_the_new_model_for_repeated_images_too(engine, models, prompts):
    before = tokens_of(generate(engine, prompts, 1, temperature=0.0))
    # The old language model with the new vision tower: a cached image would be answered from the old tower.
    mixed = dict(named(models[0])) | {name: t for name, t in named(models[1]) if "visual" in name}
    engine.load_weights(mixed.items())
    rollouts = generate(engine, prompts, 1, temperature=0.0)
    hybrid = type(models[0])(models[0].config).eval()
    hybrid.load_state_dict(mixed, strict=False)
    hybrid.tie_weights()
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(hybrid, rollout), rtol=0, atol=ATOL)
    changed = [not equal for equal in common.same(before, tokens_of(rollouts))]
    assert [changed[i] for i, p in enumerate(prompts) if not len(p.inputs.image_grid_thw)] == [False] * 4
    assert any(changed), "the tower must matter, or the test is empty"


def test_forgotten_caches_would_be_seen(engine, models, prompts, monkeypatch):
    """Negative: without the resets, repeated prompts are answered from what the old weights computed, or not at all."""
    generate(engine, prompts, 1, temperature=0.0)
    monkeypatch.setattr(VllmEngine, "_forget", lambda self: None)
    engine.load_weights(named(models[1]))
    rollouts = generate(engine, prompts, 1, temperature=0.0)
    errors = [(r.logprobs - forward_logprobs(models[1], r)).abs().max() for r in rollouts]
    assert max(errors) > 100 * ATOL
    monkeypatch.undo()
    engine.load_weights(named(models[1]))
    for rollout in generate(engine, prompts, 1, temperature=0.0):
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(models[1], rollout), rtol=0, atol=ATOL)


def test_an_incomplete_stream_is_refused_and_stops_generation(engine, models, prompts):
    lacking = [pair for pair in named(models[0]) if not pair[0].endswith("layers.2.mlp.down_proj.weight")]
    with pytest.raises(ValueError, match=r"1 parameters of vLLM's model were not given, among them .*layers.2.mlp"):
        engine.load_weights(lacking)
    with pytest.raises(RuntimeError, match="call load_weights first"):
        generate(engine, prompts)
    engine.load_weights(named(models[0]))
    generate(engine, prompts[:1])


def test_draws_are_named_by_seed_prompt_and_sample(engine, prompts):
    together = tokens_of(generate(engine, prompts, 4))
    assert tokens_of(generate(engine, prompts[::-1], 4)) == together
    alone = [rollout for prompt in prompts for rollout in generate(engine, [prompt], 4)]
    assert tokens_of(alone) == together
    assert tokens_of(generate(engine, prompts, 2)).items() <= together.items(), "fewer samples are the first samples"
    assert tokens_of(generate(engine, prompts, 4, seed=6)) != together
    assert len({tuple(together["shard/0", sample]) for sample in range(4)}) == 4


def test_more_prompts_than_fit_one_forward_pass(engine, models):
    """vLLM then cuts prompts where it may, and takes the draw at the cut back; seeded, on a CPU, that raised."""
    many = make_prompts(150)
    assert sum(len(prompt.inputs.token_ids) for prompt in many) > 4096
    rollouts = generate(engine, many, 1)
    assert tokens_of(generate(engine, many[-2:], 1)).items() <= tokens_of(rollouts).items()
    for rollout in rollouts[-20:]:
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(models[0], rollout), rtol=0, atol=ATOL)


def test_rollouts_are_ordered_and_carry_their_group(engine, prompts):
    rollouts = engine.generate(prompts[:3], 3, sampling=base.Sampling(temperature=1.0), seed=5, group_ids=[40, 7, 12])
    expected = [(f"shard/{i}", group, s) for i, group in enumerate([40, 7, 12]) for s in range(3)]
    assert [(r.prompt.key, r.group_id, r.sample_index) for r in rollouts] == expected
    assert engine.generate([], 3, sampling=base.Sampling(temperature=1.0), seed=5, group_ids=[]) == []
    for rollout in rollouts:
        assert len(rollout.response_ids) == len(rollout.logprobs) <= 48
        assert rollout.truncated == (len(rollout.response_ids) == 48 and rollout.response_ids[-1] not in common.ENDS)


def test_every_token_of_the_longest_response_counts_as_progress(engine, prompts, monkeypatch):
    advanced = []
    monkeypatch.setattr(progress, "advance", lambda: advanced.append(True))
    rollouts = generate(engine, prompts[:2], 2)
    assert len(advanced) >= max(len(rollout.response_ids) for rollout in rollouts) > 1


def test_an_engine_that_counts_its_steps_as_progress_ends_with_its_last_user():
    """Kept alive by a cycle it would keep its memory, and vLLM's settings for the whole process."""

    class Steps:
        def step(self) -> str:
            return "stepped"

    steps = Steps()
    _advance_with(steps)
    assert steps.step() == "stepped"
    left = weakref.ref(steps)
    gc.disable()
    try:
        del steps
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_not_sampled_even_when_they_are_by_far_the_likeliest(engine, models, prompts, temperature):
    name = "model.language_model.embed_tokens.weight"
    weights = dict(named(models[0]))
    embedding = weights[name].clone()
    # Whatever the sign of the first hidden value, some banned logits are huge (the head is tied).
    embedding[common.banned()] = 0.0
    embedding[common.banned(), 0] = 40.0 * (-1.0) ** torch.arange(len(common.banned()))
    engine.load_weights((weights | {name: embedding}).items())
    rollouts = generate(engine, prompts[:1], 4, temperature=temperature)
    assert not set(torch.cat([r.response_ids for r in rollouts]).tolist()) & set(common.banned())


def test_a_prompt_that_does_not_match_its_images_is_named(engine, prompts):
    inputs = replace(prompts[1].inputs, image_grid_thw=prompts[1].inputs.image_grid_thw * torch.tensor([1, 1, 2]))
    with pytest.raises(ValueError, match=r"prompt 'shard/1': its .* 16 image placeholders where .* ask for \[32\]"):
        generate(engine, [prompts[0], replace(prompts[1], inputs=inputs)])
    generate(engine, prompts[:1])
