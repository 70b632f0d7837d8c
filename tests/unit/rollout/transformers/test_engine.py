# SPDX-License-Identifier: Apache-2.0
"""The transformers engine against transformers' own ``generate`` and forward pass, on tiny random Qwen3-VL models.

``generate`` is given one unpadded prompt at a time, so that padding, batching, prompt sharing, the cache and the
decoding attention are all on one side of the comparison.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.rollout.transformers.sampling import filtered
from tests.common.tiny_model import as_prompt, hf_greedy, hf_logits, make_tiny_qwen3vl, random_inputs, special_tokens

VOCAB = 160
TOKENS = special_tokens(VOCAB)
# Many end tokens, so that rows end at many different steps and the engine has finished rows to drop.
ENDS = (TOKENS.eos, *range(20))
# fp32, and logits of order 10 from about ten layers of sums in different orders; a wrong position or mask gives > 0.1.
ATOL = 1e-5


@pytest.fixture(scope="module")
def reference():
    return make_tiny_qwen3vl(vocab=VOCAB)


@pytest.fixture(scope="module")
def prompts(reference):
    """No image, one, two of different sizes, none again (longer), and one large image."""
    grids = ((), ((4, 6),), ((2, 4), (6, 4)), (), ((8, 2),))
    return [as_prompt(x, f"shard/{i}") for i, x in enumerate(random_inputs(reference[0], grids=grids))]


def build(config, **changes):
    options = {
        "device": "cpu",
        "dtype": torch.float32,
        "eos_token_ids": ENDS,
        "pad_token_id": TOKENS.pad,
        "banned_token_ids": TOKENS.banned,
        "decode": lambda ids: " ".join(map(str, ids)),
        "max_new_tokens": 24,
        "batch_size": 64,
    }
    return TransformersEngine(config, **{**options, **changes})


def loaded(reference, **changes):
    config, model = reference
    engine = build(config, **changes)
    engine.load_weights(model.named_parameters())
    return engine


def generate(engine, prompts, n=4, *, seed=5, **sampling):
    sampling = Sampling(**{"temperature": 1.0, **sampling})
    return engine.generate(prompts, n, sampling=sampling, seed=seed, group_ids=list(range(len(prompts))))


def test_every_rollout_is_handed_over_once_as_it_leaves_the_batch(reference, prompts):
    engine, finished = loaded(reference, batch_size=4), []
    rollouts = engine.generate(
        prompts,
        3,
        sampling=Sampling(temperature=1.0),
        seed=5,
        group_ids=list(range(len(prompts))),
        on_finished=finished.append,
    )
    assert len(finished) > 4, "some are done long before the last"
    assert all(finished)
    handed = sorted(id(rollout) for share in finished for rollout in share)
    assert handed == sorted(map(id, rollouts)), "the very same, which are told apart by what they are"


def tokens_of(rollouts):
    return {(r.prompt.key, r.sample_index): r.response_ids.tolist() for r in rollouts}


@torch.no_grad()
def forward_logprobs(model, rollout, temperature=1.0):
    logits = hf_logits(model, rollout.prompt.inputs, rollout.response_ids)
    predicting = logits[len(rollout.prompt.inputs.token_ids) - 1 : -1]
    predicting[:, list(TOKENS.banned)] = -torch.inf
    table = (predicting.double() / temperature).log_softmax(-1)
    return table.gather(1, rollout.response_ids[:, None])[:, 0].float()


def greedy(model, inputs, max_new_tokens):
    return hf_greedy(model, inputs, max_new_tokens, ends=ENDS, pad=TOKENS.pad, banned=TOKENS.banned)


# Weights.


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_checkpoint_is_accepted_by_its_own_names(tmp_path, tied):
    config, model = make_tiny_qwen3vl(tmp_path, tied=tied, vocab=VOCAB)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    engine = build(tmp_path)
    engine.load_weights(stored.items())
    prompt = as_prompt(random_inputs(config)[1], "a")
    rollout = generate(engine, [prompt], 1)[0]
    torch.testing.assert_close(rollout.logprobs, forward_logprobs(model, rollout), rtol=0, atol=ATOL)


def test_a_tied_head_may_come_if_it_equals_the_embedding(reference):
    config, model = reference
    engine = build(config)
    weights = dict(model.named_parameters())
    embedding = weights["model.language_model.embed_tokens.weight"]
    engine.load_weights([*weights.items(), ("lm_head.weight", embedding)])
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.language_model.embed_tokens.weight'"):
        engine.load_weights([*weights.items(), ("lm_head.weight", embedding + 1)])


def test_every_fault_of_the_stream_names_the_parameter_and_stops_generation(reference, prompts):
    config, model = reference
    weights = list(model.named_parameters())
    name, tensor = "model.visual.blocks.1.attn.qkv.bias", model.model.visual.blocks[1].attn.qkv.bias
    without = [pair for pair in weights if pair[0] != name]
    faults = [
        ([*weights, ("model.visual.blocks.9.attn.qkv.bias", tensor)], "no parameter 'model.visual.blocks.9"),
        ([*weights, (name, tensor)], f"'{name}' was given twice"),
        ([*without, (name, tensor[:-1])], rf"'{name}' has shape \(95,\), the model expects \(96,\)"),
        (without, f"1 parameters were not given, among them {name}"),
    ]
    engine = build(config)
    for stream, message in faults:
        engine.load_weights(weights)
        with pytest.raises(ValueError, match=message):
            engine.load_weights(stream)
        with pytest.raises(RuntimeError, match="call load_weights first"):
            generate(engine, prompts)


def test_new_weights_give_the_new_model_with_its_vision_tower(reference, prompts):
    old = reference[1]
    engine = loaded(reference)
    before = tokens_of(generate(engine, prompts))
    _, new = make_tiny_qwen3vl(seed=1, vocab=VOCAB)
    engine.load_weights(new.named_parameters())
    rollouts = generate(engine, prompts)
    assert tokens_of(rollouts) != before
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(new, rollout), rtol=0, atol=ATOL)
    # The old language model with the new vision tower: a cached image would go unnoticed by the check above only if
    # images did not matter, which this excludes.
    mixed = {**dict(old.named_parameters()), **{k: v for k, v in new.named_parameters() if "visual" in k}}
    engine.load_weights(mixed.items())
    after = tokens_of(generate(engine, prompts))
    for prompt in prompts:
        same = [before[key] == after[key] for key in before if key[0] == prompt.key]
        assert all(same) if len(prompt.inputs.image_grid_thw) == 0 else not any(same)


def test_bfloat16_keeps_the_rotary_tables_in_float32(reference, prompts):
    engine = loaded(reference, dtype=torch.bfloat16)
    assert {p.dtype for p in engine._model.parameters()} == {torch.bfloat16}
    buffers = dict(engine._model.named_buffers())
    assert len(buffers) == 4
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    rollouts = generate(engine, prompts)
    difference = torch.cat([r.logprobs - forward_logprobs(reference[1], r) for r in rollouts])
    # bf16 has 8 bits: logits of order 5 through three layers. A wrong position or mask would give a mean above 0.3.
    assert difference.abs().mean() < 0.05


# Tokens and log-probabilities.


def test_greedy_tokens_are_those_of_transformers_generate(reference, prompts):
    rollouts = generate(loaded(reference), prompts, 1, temperature=0.0)
    for rollout in rollouts:
        assert rollout.response_ids.tolist() == greedy(reference[1], rollout.prompt.inputs, 24), rollout.prompt.key


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "shape",
    [
        {"vocab": VOCAB},
        {"vocab": VOCAB, "hidden": 48, "heads": 6, "kv_heads": 1, "head_dim": 32, "layers": 4, "tied": False},
        {"vocab": VOCAB, "heads": 4, "kv_heads": 4, "vision_depth": 4, "deepstack": (1, 2, 3)},
    ],
    ids=["grouped", "multi-query-untied", "multi-head-deep"],
)
def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(prompts, shape, temperature):
    reference = make_tiny_qwen3vl(seed=3, **shape)
    inputs = random_inputs(reference[0], seed=1)
    rollouts = generate(
        loaded(reference), [as_prompt(x, str(i)) for i, x in enumerate(inputs)], 8, temperature=temperature
    )
    assert len({len(r.response_ids) for r in rollouts}) > 5, "the check must cover rows that end at different steps"
    for rollout in rollouts:
        expected = forward_logprobs(reference[1], rollout, temperature)
        # The temperature divides the noise of the logits too: in float64 each of the two is as far from the truth.
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL / min(temperature, 1.0))


def test_greedy_logprobs_are_reported_at_temperature_one(reference, prompts):
    for rollout in generate(loaded(reference), prompts, 1, temperature=0.0):
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(reference[1], rollout), rtol=0, atol=ATOL)


def test_rows_that_outlive_the_room_of_the_cache_stay_exact(reference, prompts, monkeypatch):
    monkeypatch.setattr("megatron_g2rpo.rollout.transformers.batch.FREE_TOKENS", 5)
    rollouts = generate(loaded(reference, eos_token_ids=[TOKENS.eos]), prompts, 2)
    assert max(len(r.response_ids) for r in rollouts) == 24
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs, forward_logprobs(reference[1], rollout), rtol=0, atol=ATOL)


def test_first_tokens_follow_the_softmax_without_the_banned_tokens(reference, prompts):
    n = 4000
    engine = loaded(reference, max_new_tokens=1, batch_size=n)
    rollouts = generate(engine, prompts[1:2], n, temperature=0.7, seed=11)
    counts = torch.bincount(torch.cat([r.response_ids for r in rollouts]), minlength=VOCAB).double()
    with torch.no_grad():
        scores = hf_logits(reference[1], prompts[1].inputs)[-1].double() / 0.7
    excluded = scores.softmax(-1)[list(TOKENS.banned)].sum().item()
    assert excluded > 1e-4, "the model must give the banned tokens mass, or the check is empty"
    scores[list(TOKENS.banned)] = -torch.inf

    def pvalue(probabilities):
        common = n * probabilities >= 5  # chi-square needs expected counts of about 5: the rare tokens are one bin
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        expected = n * torch.cat([probabilities[common], probabilities[~common].sum()[None]])
        return stats.chisquare(observed.numpy(), expected.numpy()).pvalue

    # A fixed draw; 1e-3 is passed by 999 of 1000 correct samplers. The slightly wrong temperature shows the power.
    assert pvalue(scores.softmax(-1)) > 1e-3
    assert pvalue((scores * 0.7 / 0.8).softmax(-1)) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_not_sampled_even_when_they_are_by_far_the_likeliest(prompts, temperature):
    config, model = make_tiny_qwen3vl(vocab=VOCAB, tied=False)
    with torch.no_grad():  # whatever the sign of the first hidden value, two banned logits are huge
        model.lm_head.weight[list(TOKENS.banned)] = 0.0
        model.lm_head.weight[list(TOKENS.banned), 0] = 400.0 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    with torch.no_grad():
        likeliest = hf_logits(model, prompts[0].inputs)[-1].argmax().item()
    assert likeliest in TOKENS.banned
    engine = loaded((config, model))
    rollouts = generate(engine, prompts, 4, temperature=temperature)
    assert not set(torch.cat([r.response_ids for r in rollouts]).tolist()) & set(TOKENS.banned)


# Reproducibility.


def test_tokens_do_not_depend_on_batching_order_or_rank(reference, prompts):
    together = generate(loaded(reference), prompts, 4)
    expected = tokens_of(together)
    small = loaded(reference, batch_size=3)  # less than a group: the samples of a prompt are spread over batches
    assert tokens_of(generate(small, prompts, 4)) == expected
    engine = loaded(reference)
    assert tokens_of(generate(engine, prompts[::-1], 4)) == expected
    alone = [rollout for prompt in prompts for rollout in generate(engine, [prompt], 4)]
    assert tokens_of(alone) == expected
    ranks = generate(engine, prompts[0::2], 4) + generate(engine, prompts[1::2], 4)
    assert tokens_of(ranks) == expected
    assert tokens_of(generate(engine, prompts, 2)).items() <= expected.items(), "fewer samples are the first samples"
    logprobs = {(r.prompt.key, r.sample_index): r.logprobs for r in together}
    for rollout in alone:  # the same computation in another batch shape
        reported = logprobs[rollout.prompt.key, rollout.sample_index]
        torch.testing.assert_close(rollout.logprobs, reported, rtol=0, atol=ATOL)


def test_seed_prompt_and_sample_each_change_the_draws(reference, prompts):
    engine = loaded(reference)
    first = tokens_of(generate(engine, prompts, 4))
    assert tokens_of(generate(engine, prompts, 4)) == first
    assert tokens_of(generate(engine, prompts, 4, seed=6)) != first
    renamed = [as_prompt(prompts[0].inputs, "other")]
    assert list(tokens_of(generate(engine, renamed, 4)).values()) != list(first.values())[:4]
    assert len({tuple(ids) for ids in list(first.values())[:4]}) == 4


def test_a_lower_token_limit_gives_the_beginning_of_the_same_responses(reference, prompts):
    long, short = (tokens_of(generate(loaded(reference, max_new_tokens=k), prompts)) for k in (24, 6))
    assert {key: ids[:6] for key, ids in long.items()} == short


def test_the_global_random_state_and_gradients_are_left_alone(reference, prompts):
    state = torch.get_rng_state()
    engine = loaded(reference)
    rollouts = generate(engine, prompts)
    assert torch.equal(state, torch.get_rng_state())
    assert not engine._model.training
    assert not rollouts[0].logprobs.requires_grad
    assert not any(parameter.requires_grad for parameter in engine._model.parameters())


# Rollouts.


def test_rollouts_are_ordered_by_prompt_and_sample_and_carry_their_group(reference, prompts):
    engine = loaded(reference)
    rollouts = engine.generate(prompts, 3, sampling=Sampling(temperature=1.0), seed=5, group_ids=[40, 7, 12, 3, 90])
    assert [(r.prompt.key, r.group_id, r.sample_index) for r in rollouts] == [
        (prompt.key, group, sample)
        for prompt, group in zip(prompts, [40, 7, 12, 3, 90], strict=True)
        for sample in range(3)
    ]
    assert engine.generate([], 3, sampling=Sampling(temperature=1.0), seed=5, group_ids=[]) == []


def test_a_response_ends_with_its_first_end_token_or_is_truncated(reference, prompts):
    rollouts = generate(loaded(reference), prompts, 8)
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        ends = [token in ENDS for token in ids]
        assert ends == [False] * (len(ids) - 1) + [not rollout.truncated]
        assert len(ids) == 24 or not rollout.truncated
        assert rollout.response_ids.dtype == torch.int64
        assert rollout.logprobs.dtype == torch.float32
        assert rollout.logprobs.shape == rollout.response_ids.shape
        assert rollout.text == " ".join(map(str, ids if rollout.truncated else ids[:-1]))


def test_a_prompt_that_does_not_match_its_images_is_named(reference, prompts):
    good = prompts[1].inputs
    faulty = type(good)(
        token_ids=good.token_ids,
        pixel_values=good.pixel_values,
        image_grid_thw=good.image_grid_thw * torch.tensor([1, 1, 2]),
    )
    with pytest.raises(ValueError, match=r"prompt 'shard/bad': .* 6 image placeholders where .* ask for 12.*24 of 48"):
        generate(loaded(reference), [prompts[0], as_prompt(faulty, "shard/bad")])


def test_logits_that_are_not_finite_name_the_prompt(reference, prompts):
    config, model = reference
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    weights["model.language_model.norm.weight"][0] = torch.nan
    engine = build(config)
    engine.load_weights(weights.items())
    with pytest.raises(RuntimeError, match=r"prompt 'shard/0', sample 0, response token 0: .* not finite"):
        generate(engine, prompts[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_ids": []}, "responses could not end"),
        ({"eos_token_ids": [TOKENS.image]}, "responses could not end"),
        ({"pad_token_id": VOCAB}, "outside the model's vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_settings_are_refused(reference, changes, message):
    with pytest.raises(ValueError, match=message):
        build(reference[0], **changes)


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"group_ids": [1]}],
    ids=["no sample", "a group too few"],
)
def test_impossible_requests_are_refused(reference, prompts, arguments):
    request = {"n": 2, "sampling": Sampling(temperature=1.0), "seed": 0, "group_ids": [0, 1], **arguments}
    with pytest.raises(ValueError):
        loaded(reference).generate(prompts[:2], request.pop("n"), **request)


# Stop strings and filters.


def spelled(ids):
    """Each token is two letters, so that a stop string can span tokens and end inside of one."""
    return "".join("abcdefghij"[i % 10] + "klmnopqrst"[i // 10 % 10] for i in ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(reference, prompts, temperature):
    engine = loaded(reference, decode=spelled, eos_token_ids=(TOKENS.eos,))
    free = generate(engine, prompts, 4, temperature=temperature)
    # From the middle of one token to the middle of the next: letters that a response is known to contain.
    stops = tuple({spelled(r.response_ids[5:7].tolist())[1:3] for r in free[::3] if len(r.response_ids) > 8})
    assert stops
    stopped = 0
    for before, after in zip(
        free, generate(engine, prompts, 4, temperature=temperature, stop_strings=stops), strict=True
    ):
        text = spelled(before.response_ids.tolist())
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        length = -(-min(ends) // 2) if ends else len(before.response_ids)
        assert torch.equal(after.response_ids, before.response_ids[:length]), "the same draws, cut"
        # A batch of other sizes sums in another order.
        torch.testing.assert_close(after.logprobs, before.logprobs[:length], rtol=0, atol=ATOL)
        if ends:
            stopped += 1
            assert not after.truncated
            assert after.text == text[: min(ends)]
        else:
            assert (after.truncated, after.text) == (before.truncated, before.text)
    assert stopped >= len(stops)


def test_logprobs_of_a_filtered_distribution_are_those_of_what_is_kept(reference, prompts):
    sampling = Sampling(temperature=0.7, top_k=12, top_p=0.9)
    for rollout in generate(loaded(reference), prompts, 4, temperature=0.7, top_k=12, top_p=0.9):
        logits = hf_logits(reference[1], rollout.prompt.inputs, rollout.response_ids)
        predicting = logits[len(rollout.prompt.inputs.token_ids) - 1 : -1].detach()
        predicting[:, list(TOKENS.banned)] = -torch.inf
        table = filtered(predicting.double() / 0.7, sampling).log_softmax(-1)
        expected = table.gather(1, rollout.response_ids[:, None])[:, 0].float()
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL)


def test_rollouts_say_what_each_token_was_sampled_from(reference, prompts):
    filters = {"top_k": 12, "top_p": 0.9, "return_kept": True}
    sampling = Sampling(temperature=1.0, **filters)
    counts = set()
    for rollout in generate(loaded(reference, batch_size=5), prompts, 4, **filters):
        logits = hf_logits(reference[1], rollout.prompt.inputs, rollout.response_ids)
        predicting = logits[len(rollout.prompt.inputs.token_ids) - 1 : -1].detach()
        predicting[:, list(TOKENS.banned)] = -torch.inf
        expected = filtered(predicting.double(), sampling).isfinite()
        assert rollout.kept_ids.shape[0] == len(rollout.response_ids)
        for kept, row in zip(rollout.kept_ids, expected, strict=True):
            counts.add(int(row.sum()))
            assert sorted(kept[kept >= 0].tolist()) == row.nonzero()[:, 0].tolist()
        assert (rollout.kept_ids == rollout.response_ids[:, None]).any(1).all()
    assert len(counts) > 1, "top_p should leave different numbers of tokens"
    assert all(rollout.kept_ids is None for rollout in generate(loaded(reference), prompts[:1], 1, top_k=12))
