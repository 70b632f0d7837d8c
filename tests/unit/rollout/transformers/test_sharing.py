# SPDX-License-Identifier: Apache-2.0
"""Claims: a call computes a prompt and an image once, whatever the batch, and no response notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.rollout.base import GenerationWork, Sampling
from megatron_g2rpo.rollout.transformers import batch as batches
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.rollout.transformers.prefill import Prefill
from megatron_g2rpo.rollout.transformers.prefix_cache import PrefixCache
from megatron_g2rpo.types import ModelInputs, Prompt, Rollout
from tests.common.tiny_model import as_prompt, hf_logits, make_tiny_qwen3vl, random_inputs, special_tokens

VOCAB = 160
TOKENS = special_tokens(VOCAB)
ENDS = (TOKENS.eos, *range(12))
# fp32, through about ten layers; a mistake in who sees whom gives more than 0.1.
ATOL = 1e-5
SAMPLED = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def reference() -> Any:
    return make_tiny_qwen3vl(vocab=VOCAB)


@pytest.fixture(scope="module")
def prompts(reference: Any) -> list[Prompt]:
    """No image, one, two of different sizes, none again; lengths from 12 to 40."""
    grids = ((), ((4, 6),), ((2, 4), (6, 4)), ())
    return [as_prompt(x, f"shard/{i}") for i, x in enumerate(random_inputs(reference[0], grids=grids, text_tokens=12))]


def loaded(reference: Any, **changes: Any) -> TransformersEngine:
    config, model = reference
    options = {
        "device": "cpu",
        "dtype": torch.float32,
        "eos_token_ids": ENDS,
        "pad_token_id": TOKENS.pad,
        "banned_token_ids": TOKENS.banned,
        "decode": lambda ids: " ".join(map(str, ids)),
        "max_new_tokens": 16,
        "batch_size": 64,
    }
    engine = TransformersEngine(config, **{**options, **changes})
    engine.load_weights(model.named_parameters())
    return engine


def generate(engine: TransformersEngine, prompts: list[Prompt], n: int, **keywords: Any) -> list[Rollout]:
    request = {"sampling": SAMPLED, "seed": 5, "group_ids": list(range(len(prompts))), **keywords}
    return engine.generate(prompts, n, **request)


def tokens_of(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in rollouts]


@torch.no_grad()
def largest_difference(model: Any, rollouts: list[Rollout]) -> float:
    """Between reported log-probabilities and those of transformers' forward over each sequence, alone and unpadded."""
    worst = 0.0
    for rollout in rollouts:
        logits = hf_logits(model, rollout.prompt.inputs, rollout.response_ids)
        predicting = logits[len(rollout.prompt.inputs.token_ids) - 1 : -1]
        predicting[:, list(TOKENS.banned)] = -torch.inf
        expected = predicting.double().log_softmax(-1).gather(1, rollout.response_ids[:, None])[:, 0].float()
        worst = max(worst, float((rollout.logprobs - expected).abs().max()))
    return worst


@pytest.mark.parametrize("n", [1, 2, 8])
def test_log_probabilities_are_those_of_each_sequence_alone(reference: Any, prompts: list[Prompt], n: int) -> None:
    rollouts = generate(loaded(reference), prompts, n)
    assert len(rollouts) == n * len(prompts)
    assert largest_difference(reference[1], rollouts) <= ATOL


@pytest.mark.parametrize("batch_size", [1, 3, 5, 9])
def test_more_responses_than_the_batch_holds_are_the_same_responses(
    reference: Any, prompts: list[Prompt], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(loaded(reference), prompts, 4)
    monkeypatch.setattr(batches, "FREE_TOKENS", 5)
    engine = loaded(reference, batch_size=batch_size)
    sizes: list[int] = []
    step = engine._forward.step
    monkeypatch.setattr(
        engine._forward, "step", lambda tokens, *rest: (sizes.append(len(tokens)), step(tokens, *rest))[1]
    )
    found = generate(engine, prompts, 4)
    assert max(sizes) == batch_size
    assert tokens_of(found) == tokens_of(expected)
    assert largest_difference(reference[1], found) <= ATOL
    assert engine.work == loaded_work(reference, prompts, 4), "no prompt or image is computed twice"


def loaded_work(reference: Any, prompts: list[Prompt], n: int) -> GenerationWork:
    engine = loaded(reference)
    generate(engine, prompts, n)
    return engine.work


def test_a_batch_is_refilled_before_it_is_empty(
    reference: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a long response would keep all others waiting."""
    engine = loaded(reference, batch_size=4)
    sizes: list[int] = []
    step = engine._forward.step
    monkeypatch.setattr(
        engine._forward, "step", lambda tokens, *rest: (sizes.append(len(tokens)), step(tokens, *rest))[1]
    )
    lengths = [len(rollout.response_ids) for rollout in generate(engine, prompts, 8)]
    assert max(lengths) > 2 * min(lengths), "the check needs responses that end at different steps"
    # A response decodes at every token but its last; batch by batch, each would take as long as its longest.
    ordered = [max(lengths[start : start + 4]) - 1 for start in range(0, len(lengths), 4)]
    assert len(sizes) < sum(ordered)


def test_filters_and_stop_strings_hold_in_a_refilled_batch(reference: Any, prompts: list[Prompt]) -> None:
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.9, stop_strings=("7 1", "42"), return_kept=True)
    whole = generate(loaded(reference), prompts, 4, sampling=sampling)
    refilled = generate(loaded(reference, batch_size=3), prompts, 4, sampling=sampling)
    assert tokens_of(whole) == tokens_of(refilled)
    for one, other in zip(whole, refilled, strict=True):
        assert (one.text, one.truncated) == (other.text, other.truncated)
        assert one.kept_ids is not None
        assert other.kept_ids is not None
        kept = [[sorted(set(row.tolist()) - {-1}) for row in each.kept_ids] for each in (one, other)]
        assert kept[0] == kept[1]
        assert all(token in row for token, row in zip(one.response_ids.tolist(), kept[0], strict=True))


# Images.


def test_each_image_is_encoded_once_and_each_prompt_prefilled_once(reference: Any, prompts: list[Prompt]) -> None:
    engine = loaded(reference, batch_size=3)
    encoded: list[str] = []
    encode = engine._prefill.encode
    engine._prefill.encode = lambda images: (encoded.extend(i.name for i in images), encode(images))[1]  # type: ignore
    rollouts = generate(engine, prompts, 4)
    assert len(encoded) == len(set(encoded)) == 3
    tokens = sum(len(prompt.inputs.token_ids) for prompt in prompts)
    patches = sum(len(prompt.inputs.pixel_values) for prompt in prompts)
    assert engine.work == GenerationWork(
        prompt_tokens=tokens,
        prompt_tokens_saved=3 * tokens,
        decoded_tokens=sum(len(rollout.response_ids) for rollout in rollouts),
        patches=patches,
        patches_saved=3 * patches,
    )


def test_an_image_of_several_prompts_is_encoded_once_and_is_theirs(reference: Any, prompts: list[Prompt]) -> None:
    shown = prompts[1].inputs
    questions = []
    for number in range(3):
        ids = shown.token_ids.clone()
        ids[:4] = torch.tensor([number, 9, 8, 7])
        inputs = ModelInputs(
            token_ids=ids, pixel_values=shown.pixel_values.clone(), image_grid_thw=shown.image_grid_thw.clone()
        )
        questions.append(as_prompt(inputs, f"question/{number}"))
    # Other pixels in the same grid: not the same image.
    other = ModelInputs(
        token_ids=shown.token_ids, pixel_values=shown.pixel_values + 1.0, image_grid_thw=shown.image_grid_thw
    )
    asked = [*questions, as_prompt(other, "other")]
    engine = loaded(reference)
    rollouts = generate(engine, asked, 2)
    assert engine.work.patches == 2 * len(shown.pixel_values)
    assert largest_difference(reference[1], rollouts) <= ATOL


def test_a_prompt_that_is_asked_under_two_names_is_prefilled_once(reference: Any, prompts: list[Prompt]) -> None:
    engine = loaded(reference)
    twice = [as_prompt(prompts[1].inputs, name) for name in ("one", "other")]
    rollouts = generate(engine, twice, 2)
    assert engine.work.prompt_tokens == len(prompts[1].inputs.token_ids)
    assert [rollout.prompt.key for rollout in rollouts] == ["one", "one", "other", "other"]
    assert tokens_of(rollouts) == [t for prompt in twice for t in tokens_of(generate(engine, [prompt], 2))]


def test_images_come_from_the_cache_while_its_weights_are_the_engines(reference: Any, prompts: list[Prompt]) -> None:
    cache = VisionCache(10**8, frozen=False)
    engine = loaded(reference, vision_cache=cache)
    expected = tokens_of(generate(loaded(reference), prompts, 2))
    assert tokens_of(generate(engine, prompts, 2)) == expected
    assert engine.work.patches > 0
    assert tokens_of(generate(engine, prompts, 2)) == expected
    assert engine.work.patches == 0
    assert engine.work.patches_saved == 2 * sum(len(prompt.inputs.pixel_values) for prompt in prompts)
    _, other = make_tiny_qwen3vl(seed=1, vocab=VOCAB)
    cache.weights_changed()
    engine.load_weights(other.named_parameters())
    assert largest_difference(other, generate(engine, prompts, 2)) <= ATOL
    assert engine.work.patches > 0


# Greedy answers beside sampled ones.


def test_greedy_answers_beside_sampled_ones_are_those_of_two_calls(reference: Any, prompts: list[Prompt]) -> None:
    engine = loaded(reference, batch_size=5)
    sampling = Sampling(temperature=0.7, top_p=0.9, stop_strings=("42",))
    both = generate(engine, prompts, 2, sampling=sampling, and_greedily=True)
    work = engine.work
    apart = generate(engine, prompts, 2, sampling=sampling)
    prefilled = engine.work.prompt_tokens
    apart += generate(engine, prompts, 1, sampling=sampling.greedily)
    assert tokens_of(both) == tokens_of(apart)
    for one, other in zip(both, apart, strict=True):
        assert (one.prompt.key, one.group_id, one.sample_index) == (
            other.prompt.key,
            other.group_id,
            other.sample_index,
        )
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=ATOL)
    assert work.prompt_tokens == prefilled, "one prefill serves both"


# What would be silent.


def wrong_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange = PrefixCache._arrange

    def mistaken(self: PrefixCache, rows: Any) -> None:
        arrange(self, rows)
        self._prompts = [(keys.roll(1, 1), values.roll(1, 1)) for keys, values in self._prompts]

    monkeypatch.setattr(PrefixCache, "_arrange", mistaken)


def siblings_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    append = PrefixCache.append
    monkeypatch.setattr(
        PrefixCache, "append", lambda self, layer, keys, values: append(self, layer, keys.roll(1, 1), values)
    )


def padding_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange = PrefixCache._arrange

    def mistaken(self: PrefixCache, rows: Any) -> None:
        arrange(self, rows)
        self._prompt_bias = None

    monkeypatch.setattr(PrefixCache, "_arrange", mistaken)


def positions_one_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = Prefill._positions

    def mistaken(self: Prefill, prompts: Any) -> Any:
        of_prompts, following = positions(self, prompts)
        return of_prompts, following + 1

    monkeypatch.setattr(Prefill, "_positions", mistaken)


def positions_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = Prefill._positions

    def mistaken(self: Prefill, prompts: Any) -> Any:
        return positions(self, prompts)[0], torch.tensor([len(prompt.token_ids) for prompt in prompts])

    monkeypatch.setattr(Prefill, "_positions", mistaken)


def earlier_columns_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange = PrefixCache._arrange

    def mistaken(self: PrefixCache, rows: Any) -> None:
        arrange(self, rows)
        self._own_bias = None

    monkeypatch.setattr(PrefixCache, "_arrange", mistaken)


def other_image(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Prefill.encode
    monkeypatch.setattr(Prefill, "encode", lambda self, images: [each.flip(0) for each in encode(self, images)])


@pytest.mark.parametrize(
    "mistake",
    [
        wrong_prompt,
        siblings_keys,
        padding_seen,
        positions_one_too_far,
        positions_of_text,
        earlier_columns_seen,
        other_image,
    ],
    ids=lambda each: each.__name__,
)
def test_a_mistake_is_noticed(
    reference: Any,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
) -> None:
    engine = loaded(reference, batch_size=6)
    mistake(monkeypatch)
    assert largest_difference(reference[1], generate(engine, prompts, 4)) > 0.01
